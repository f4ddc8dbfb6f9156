"""Golden files of the record format, and readers that do not share kvstore's code."""
