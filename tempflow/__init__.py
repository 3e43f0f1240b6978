"""TempFlow-GRPO: trajectory branching, noise-aware weighting and seed groups for flow-matching models."""

import logging

# diffusers imports bitsandbytes, which on some processors warns at each start of a 4-bit kernel that nothing here uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
