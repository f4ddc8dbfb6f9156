"""The programs that are compared: ours, and others that move the same bytes."""
