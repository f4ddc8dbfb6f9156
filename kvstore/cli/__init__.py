"""The command `kvstore`."""
