"""A run: put together, recorded, saved, evaluated."""
