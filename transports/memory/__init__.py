"""Connections inside one process, with one-sided reads: what RDMA looks like, without the hardware."""

from transports.memory.transport import MemoryTransport

__all__ = ["MemoryTransport"]
