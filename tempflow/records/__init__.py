"""What a run writes, and what is drawn from it."""
