"""Memory of a device: slabs of our own, staging, streams. Nothing here imports torch before a device is asked for."""
