"""Runs of several stacks and seeds, compared: a study."""
