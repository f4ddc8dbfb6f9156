"""The SSD tier: a shelf over one or several directories.

shelf = open_ssd(spec, "/var/cache/kv:200GiB")
"""

from kvstore.placement.ssd.opening import open_ssd
from kvstore.placement.ssd.options import SsdOptions, SsdPlace
from kvstore.placement.ssd.shelf import SsdShelf

__all__ = ["SsdOptions", "SsdPlace", "SsdShelf", "open_ssd"]
