"""Checks across settings."""

from __future__ import annotations

from tempflow.common.errors import BadInput
from tempflow.settings.fields import Config


def group_size(config: Config) -> int:
    """Branches whose rewards are compared with one another."""
    branch = config.branch
    trunks = {"seed": 1, "prompt": explore.noises, "batch": explore.noises * explore.prompts}[config.credit.group]
    return explore.siblings * trunks


def check_consistency(config: Config, ranks: int) -> None:
    """Arithmetic across settings.

    Raises:
        BadInput: siblings that cannot be compared, or batches that would be cut unevenly.
    """
    branch, learn = config.branch, config.learn
    if group_size(config) < 2:
        mend = f"a {credit.group} group compares branches, so it needs at least 2; or choose a wider credit.group"
        raise BadInput("explore.siblings", explore.siblings, mend)
    if explore.prompts % ranks:
        raise BadInput("explore.prompts", explore.prompts, f"must be a multiple of the {ranks} processes")
    trunks = explore.prompts * explore.noises // ranks
    if trunks % learn.rows:
        mend = f"must divide the {trunks} trunks of a process (prompts x seeds / processes), or a batch would be cut"
        raise BadInput("learn.rows", learn.rows, mend)
    batches = trunks // learn.rows
    if batches % learn.updates:
        mend = f"must divide the {batches} batches (trunks / learn.rows): an update takes whole forks with all siblings"
        raise BadInput("learn.updates", learn.updates, mend)
    if objective.kl_divisor == "diffusion" and config.sample.transition == "cps":
        raise BadInput("objective.kl_divisor", "diffusion", "cps has no diffusion coefficient; use objective.kl_divisor=std")
