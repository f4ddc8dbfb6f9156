"""Model families of `transformers`: a mechanism per function, a table of who uses which."""

from kvstore.spec.families.layers import NO_CACHE, layer_configs, layer_types
from kvstore.spec.families.mechanism import Mechanism, MechanismBuilder
from kvstore.spec.families.numerics import numerics_digest
from kvstore.spec.families.registry import FAMILIES, FAMILY_OF, REFUSED, Family

__all__ = [
    "FAMILIES",
    "FAMILY_OF",
    "NO_CACHE",
    "REFUSED",
    "Family",
    "Mechanism",
    "MechanismBuilder",
    "layer_configs",
    "layer_types",
    "numerics_digest",
]
