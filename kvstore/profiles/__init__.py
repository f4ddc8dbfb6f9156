"""Profiles as files: those that ship with the package, and those that `kvstore profile` measures (docs/profiles.md)."""

from kvstore.profiles.files import load_profile, profile_names, write_profile
from kvstore.profiles.throughput import PublishedThroughput, published_kv_throughput

__all__ = ["PublishedThroughput", "load_profile", "profile_names", "published_kv_throughput", "write_profile"]
