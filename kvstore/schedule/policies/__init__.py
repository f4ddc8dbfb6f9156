"""What to do with a request, and with instances: pure functions over snapshots, run by servers and simulator alike."""
