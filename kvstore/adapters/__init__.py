"""Bridges between engines' own caches and the store: translation only."""
