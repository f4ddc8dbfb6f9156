"""The command: arguments, environment, exit status."""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import TYPE_CHECKING

from .arguments import parse_arguments
from .child import DemoError
from .display import Display
from .scenario import Scenario
from .supervise import Supervisor
from .trained_model import weights_file

if TYPE_CHECKING:
    from .arguments import Options

FAILED_STATUS = 1
INTERRUPTED_STATUS = 130

ENVIRONMENT = {
    # One thread each: two processes that each use every core mostly wait for each other.
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
    # Nothing is downloaded, and no optional kernel's absence or loading bar comes between our lines.
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TQDM_DISABLE": "1",
}


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; the exit status."""
    options = parse_arguments(arguments)
    # The children inherit it, and it has to be there before they import torch; this process never does.
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        _check_installed(options)
        with Display() as display, Supervisor(options, display.progress) as supervisor:
            Scenario(options, display, supervisor).run()
    except (DemoError, ModuleNotFoundError) as error:
        print(f"\ndemo failed: {error}", file=sys.stderr)
        return FAILED_STATUS
    except KeyboardInterrupt:
        print("\ninterrupted; both processes have been ended", file=sys.stderr)
        return INTERRUPTED_STATUS
    return 0


def _check_installed(options: Options) -> None:
    """Say what is missing before anything starts.

    Raises:
        ModuleNotFoundError: with the remedy.
    """
    for name in ("torch", "transformers"):
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"the demo needs the package {name}; run `make demo`, or: pip install '.[demo]'")
    if options.is_trained:
        weights_file()
