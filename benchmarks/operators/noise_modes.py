"""The noise of the Triton kernels, exact or fast, as far as the installed kernels know both."""

import tempflow_kernels as tk

KNOWN = hasattr(tk, "use_noise")
MODES = ("fast", "exact") if KNOWN else ("exact",)


def use_noise(mode):
    """From now on kernels draw in that mode, if they know several; by default (None, auto) in the first of them."""
    if KNOWN:
        tk.use_noise(mode if mode in MODES else MODES[0])
