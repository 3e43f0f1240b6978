"""The doors: what `tempflow NAME` runs, one module each."""
