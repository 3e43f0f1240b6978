"""Operators for reinforcement learning of flow-matching models: sampler step, log-probability, ratio, loss, noise.

Imports only torch (and triton where it is used). Every operator is defined by its plain-torch form in `plain/`;
`ops` checks arguments and hands over to the backend of the device: C++ on CPU, Triton on CUDA and ROCm.
"""

from .info import backend_info
from .noise_setting import noise_mode, use_noise
from .ops import branch_loss, gaussian_terms, log_ratio, normal_like, transition_log_prob, transition_step
from .plain.philox import fold_key, philox4x32
from .plain.reference import BranchLossStats

__version__ = "0.1.0"

__all__ = [
    "BranchLossStats",
    "backend_info",
    "branch_loss",
    "fold_key",
    "gaussian_terms",
    "log_ratio",
    "noise_mode",
    "normal_like",
    "philox4x32",
    "transition_log_prob",
    "transition_step",
    "use_noise",
]
