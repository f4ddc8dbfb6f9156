"""Whether the installed torch and transformers are ones that this adapter knows; imported before anything else."""

from __future__ import annotations

from kvstore.errors import UnavailableError

TRANSFORMERS_MIN = "5.23"
"""Cache layers have had their present classes since this release."""
_REMEDY = "install kvstore[transformers]"

try:
    import torch  # noqa: F401
    import transformers
    from transformers import cache_utils
except ImportError as error:
    raise UnavailableError(f"the transformers adapter cannot be used: {error}; {_REMEDY}") from error

if not hasattr(cache_utils, "DummyLayer"):
    raise UnavailableError(
        f"the transformers adapter needs transformers {TRANSFORMERS_MIN} or later, found {transformers.__version__}; "
        f"{_REMEDY}"
    )
