"""Measuring transfers against other ways to move the same bytes: `kvstore bench transfer` (docs/benchmarks.md).

Nothing is imported here: the command line loads what a command needs.
"""
