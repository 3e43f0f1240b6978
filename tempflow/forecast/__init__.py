"""What a run will do, cost and weigh, before it starts."""
