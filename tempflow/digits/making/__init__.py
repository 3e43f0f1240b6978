"""The scripts that made the embedded benchmark."""
