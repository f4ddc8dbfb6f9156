"""Tests with the real inference engines, each in an environment of its own: `python -m tests.engines`.

This side runs in kvstore's own environment and imports no engine: it installs engines, writes plans, judges results.
What runs inside an engine's environment is a script that reads a plan and writes a result, both JSON.
"""
