"""Who prefills what and where: throughput, plans and policies. Pure functions over values; no I/O, no clock."""
