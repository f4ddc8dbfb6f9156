"""Traces of requests that others have published, as sessions of calls. docs/traces.md says how each is mapped."""

from kvstore.simulate.traces.agentic import read_agentic
from kvstore.simulate.traces.bundled import bundled
from kvstore.simulate.traces.mooncake import read_mooncake

__all__ = ["bundled", "read_agentic", "read_mooncake"]
