"""Fuzz parsers for as long as you like: `python -m tests.fuzz [TARGET ...] [--seconds N] [--seed N]`."""

from __future__ import annotations

import argparse
import faulthandler
import sys

from tests.fuzz.run import FuzzError, fuzz
from tests.fuzz.targets import TARGETS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"any of {', '.join(TARGETS)}; all by default")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each target")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    if unknown := set(arguments.targets) - set(TARGETS):
        parser.error(f"unknown targets: {', '.join(sorted(unknown))}")
    faulthandler.enable()  # a parser that ends the process names itself by its last line
    for name in arguments.targets or TARGETS:
        print(f"{name}: seed {arguments.seed}", flush=True)
        target = TARGETS[name]()
        try:
            tried = fuzz(target, seed=arguments.seed, inputs_max=sys.maxsize, seconds_max=arguments.seconds)
        except FuzzError as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 1
        print(f"{name}: {tried} inputs, nothing but named errors")
    return 0


if __name__ == "__main__":
    sys.exit(main())
