"""How much a deployment serves: the throughput model of the paper in general form, optima, goodput."""
