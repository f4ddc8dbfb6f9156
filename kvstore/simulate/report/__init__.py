"""What a simulation comes to: figures, tables, and a page to put in front of a colleague. Reads results alone."""
