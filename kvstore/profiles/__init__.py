"""Profiles as files: those that ship with the package, and those that `kvstore profile` measures (docs/profiles.md)."""
