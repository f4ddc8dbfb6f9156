"""Benchmarks, sorted by question; `make bench` runs them."""
