"""A node: a pool that serves other machines, with health, metrics, logs and a graceful end (docs/operations.md)."""

from kvstore.cluster.config import AttachConfig, HttpConfig, LogConfig, NodeConfig, TransportConfig
from kvstore.cluster.config_file import read_config
from kvstore.cluster.logs import configure_logging
from kvstore.cluster.node import Node, NodeState
from kvstore.cluster.snapshot import NodeSnapshot, ReceiverSnapshot

__all__ = [
    "AttachConfig",
    "HttpConfig",
    "LogConfig",
    "Node",
    "NodeConfig",
    "NodeSnapshot",
    "NodeState",
    "ReceiverSnapshot",
    "TransportConfig",
    "configure_logging",
    "read_config",
]
