"""Drop-in for Flow-CPS: `from tempflow_kernels.compat.flow_cps import sde_step_with_logprob`.

Same signature, same returned tuple, same meaning of every argument as the function of that name in IamCreateAI/FlowCPS,
`flow_grpo/diffusers_patch/sd3_sde_with_logprob.py`: coefficients-preserving sampling (arXiv 2509.05952) at every call,
and a log-probability without variance and constants. What differs from the original is said in `flow_grpo`.
"""

from __future__ import annotations

import torch

from .flow_grpo import KINDS, step
from .steps import exact_signature


@exact_signature
def sde_step_with_logprob(
    self,
    model_output: torch.FloatTensor,
    timestep: float | torch.FloatTensor,
    sample: torch.FloatTensor,
    noise_level: float = 0.7,
    prev_sample: torch.FloatTensor | None = None,
    generator: torch.Generator | None = None,
):
    """One step of coefficients-preserving sampling: std = next sigma * sin(noise_level pi / 2).

    Args:
        self, model_output, timestep, sample, prev_sample, generator: as in `flow_grpo.sde_step_with_logprob`.
        noise_level: 0 to 2; 0 and 2 are deterministic, above 1 the std falls again.
    Returns:
        (prev_sample, log_prob (R,) = -(prev_sample - mean)^2 averaged, prev_sample_mean, std_dev_t), all fp32.
    Raises:
        ValueError: a level out of range, or tensors, timesteps or generators that do not fit.
        TypeError: a keyword that the original does not have.
    """
    return step(KINDS["cps"], self, model_output, timestep, sample, noise_level, prev_sample, generator)[:4]
