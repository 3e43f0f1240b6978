"""Scorers, here and on other machines."""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # else it warns of packages that nothing here needs
