"""The doors: what  runs."""
