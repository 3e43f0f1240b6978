"""The scripts that made the scenes."""
