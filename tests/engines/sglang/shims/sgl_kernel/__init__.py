"""Stands in for SGLang's package of GPU kernels (370 MB): names to import, and the one operator that a CPU run calls.

Anything else raises when it is called.
"""

import sys
from types import ModuleType


def assign_req_to_token_pool_cpu(requests, table, starts, stops, slots, width):
    """Write the slots of each request's new tokens into its row of the table."""
    first = 0
    for request, start, stop in zip(requests.tolist(), starts.tolist(), stops.tolist(), strict=True):
        table[request, start:stop] = slots[first : first + stop - start].to(table.dtype)
        first += stop - start


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_arguments, **_options):
        raise NotImplementedError(f"sgl_kernel.{name} is a GPU kernel, which is not here")

    return missing


def _module(name, lookup):
    module = ModuleType(f"{__name__}.{name}")
    module.__getattr__ = lookup
    sys.modules[module.__name__] = module
    return module


for _name in ("elementwise", "flash_attn", "kvcacheio", "mamba", "quantization", "utils"):
    _module(_name, __getattr__)


class ScalarType:
    """An element type of quantized weights: tables of them are made at import, and looked at by kernels alone."""


class _ScalarTypes:
    def __getattr__(self, name):
        return ScalarType()


_scalar_type = _module("scalar_type", __getattr__)
_scalar_type.ScalarType = ScalarType
_scalar_type.scalar_types = _ScalarTypes()
