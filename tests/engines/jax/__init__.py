"""What is tested with JAX: the adapter's own tests and the example, where JAX is installed."""
