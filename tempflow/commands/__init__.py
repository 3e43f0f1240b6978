"""The doors: what `python -m tempflow.commands.NAME` runs."""
