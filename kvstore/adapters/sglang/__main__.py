"""The spec file with which `kvstore serve` holds SGLang's pages.

python -m kvstore.adapters.sglang --model my/model --weights sha256:1f0c... --page-bytes 2097152 > spec.json
"""

from __future__ import annotations

import argparse
import sys

from kvstore.adapters.sglang.storage import objects_namespace
from kvstore.errors import SpecError
from kvstore.spec import spec_to_file_text


def main(arguments: list[str] | None = None) -> int:
    """Print the file to standard output; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m kvstore.adapters.sglang", description=(__doc__ or "").strip())
    parser.add_argument("--model", required=True, help="as SGLang names it, or as the backend's settings do")
    parser.add_argument("--weights", required=True, help="as the backend's settings name them")
    parser.add_argument(
        "--page-bytes", required=True, type=int, action="append",
        help="bytes of a page of a pool on one rank, once for each pool; SGLang's log has them",
    )  # fmt: skip
    parser.add_argument("--chunk-bytes", type=int, default=0, help="of the store's records; chosen by default")
    told = parser.parse_args(arguments)
    groups = tuple((str(number), size_bytes) for number, size_bytes in enumerate(told.page_bytes))
    try:
        namespace = objects_namespace(told.model, told.weights, "any", groups, told.chunk_bytes)
    except SpecError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    sys.stdout.write(spec_to_file_text(namespace.spec))
    return 0


if __name__ == "__main__":
    sys.exit(main())
