"""Traces of requests that others have published, as sessions of calls. docs/traces.md says how each is mapped."""

from kvstore.workload.traces.agentic import read_agentic
from kvstore.workload.traces.bundled import bundled
from kvstore.workload.traces.mooncake import read_mooncake

__all__ = ["bundled", "read_agentic", "read_mooncake"]
