"""Other stores, driven as their own users would drive them, for comparisons on one machine."""
