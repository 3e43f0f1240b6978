"""Operators for reinforcement learning of flow-matching models: sampler step, log-probability, ratio, loss, noise.

Imports only torch (and triton where it is used). Every operator is defined by its plain-torch form in `reference`.
"""

from .philox import fold_key, philox4x32
from .reference import (
    BranchLossStats,
    branch_loss,
    log_ratio,
    normal_like,
    transition_log_prob,
    transition_step,
)

__all__ = [
    "BranchLossStats",
    "branch_loss",
    "fold_key",
    "log_ratio",
    "normal_like",
    "philox4x32",
    "transition_log_prob",
    "transition_step",
]
