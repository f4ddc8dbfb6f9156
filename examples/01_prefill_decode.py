"""A hybrid model's prompt, prefilled in one process and decoded in another: `make demo`, or this file with --help.

The modules in `prefill_decode/` do the work; what touches the library is in `prefill_process.py` and
`decode_process.py`.
"""

from __future__ import annotations

import sys

from prefill_decode.main import main  # type: ignore[import-not-found]

if __name__ == "__main__":
    sys.exit(main())
