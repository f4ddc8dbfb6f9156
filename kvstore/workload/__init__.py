"""What comes: requests of traces and of seeded generators, and what a planner needs to know of them."""
