"""`python -m kvstore` is the command `kvstore`."""

from __future__ import annotations

from kvstore.cli.main import main

if __name__ == "__main__":
    main()
