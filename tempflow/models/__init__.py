"""Models of diffusers behind the interface of `policy.py`."""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # else it warns of packages that nothing here needs
