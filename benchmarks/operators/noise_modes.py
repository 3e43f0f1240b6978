"""The noise of the Triton kernels, exact or fast, as far as the installed kernels know both."""

import tempflow_kernels as tk

KNOWN = hasattr(tk, "use_noise")
MODES = ("fast", "exact") if KNOWN else ("exact",)


def use_noise(mode):
    """From now on kernels draw in that mode; None leaves it as it is, and so do kernels that know one mode only."""
    if KNOWN and mode is not None:
        tk.use_noise(mode)
