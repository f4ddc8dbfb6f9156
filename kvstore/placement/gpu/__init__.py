"""Tiers in the memory of a device."""
