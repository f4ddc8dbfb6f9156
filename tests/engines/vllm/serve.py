"""`kvstore serve` in the engine's environment, with the arguments of the command line."""

from __future__ import annotations

from kvstore.cli.main import main

if __name__ == "__main__":
    main()
