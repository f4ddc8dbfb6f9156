"""Segments and the journal of an SSD tier, and the engines that move their bytes."""
