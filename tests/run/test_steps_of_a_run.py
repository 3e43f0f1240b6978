"""Optimizer steps over ranks: which of them have nothing to learn, and gradients averaged bucket by bucket."""

import pytest
import torch

from tempflow.credit.advantage import Credit
from tempflow.explore.rollout import Decision, Rollout
from tempflow.explore.schedule import build_schedule
from tempflow.learn.batches import updates
from tempflow.learn.objective import make_objective
from tempflow.parallel import ranks as distributed
from tempflow.parallel.ranks import Ranks
from tempflow.policy import Conditioning
from tempflow.settings.fields import LearnConfig, ObjectiveConfig

CPU = torch.device("cpu")
SCHEDULE = build_schedule(torch.linspace(1, 0, 5), "flow_sde", 0.7)


def idle(informative: torch.Tensor, ranks: int, kl: float = 0.0, idle: str = "keep", **learn) -> list[bool]:
    """Which optimizer steps of the first process are idle, for groups (3 forks, 8 trunks of all processes)."""
    own = range(8 // ranks)
    texts = Conditioning({"shift": torch.zeros(len(own))})
    states, keys = torch.zeros(len(own), 2), torch.zeros(len(own), 2, dtype=torch.int64)
    steps = [torch.full((len(own),), fork) for fork in range(3)]
    decisions = tuple(Decision(fork, steps[fork], states, states, keys, 2, texts) for fork in range(3))
    rollout = Rollout(decisions, torch.zeros(3, len(own), 2, 2), torch.ones(3, len(own)), texts)
    credit = Credit(informative[..., None].float().repeat(1, 1, 2), informative, 24, int((~informative).sum()))
    objective = make_objective(ObjectiveConfig(kl=kl), SCHEDULE, [0, 1, 2], idle)
    found = list(updates(rollout, credit, objective, LearnConfig(rows=2, **learn), own))
    if kl == 0 or idle == "drop":  # nothing but informative rows is computed
        own_part = informative[:, : len(own)]
        assert sum(len(update.batches) for update in found) <= int(own_part.sum()) * len(found)
    return [update.idle for update in found]


def test_an_update_is_idle_where_no_rank_learns():
    """8 trunks on 2 ranks, 2 updates: the first takes trunks 0 1 of rank 0 and 4 5 of rank 1."""
    informative = torch.zeros(3, 8, dtype=torch.bool)
    assert idle(informative, 2, updates=2) == [True, True]
    assert idle(informative, 2, kl=0.1, updates=2) == [False, False]
    assert idle(informative, 2, kl=0.1, idle="drop", updates=2) == [True, True]
    for trunk, expected in ((1, [False, True]), (4, [False, True]), (3, [True, False]), (6, [True, False])):
        informative.zero_()[2, trunk] = True
        assert idle(informative, 2, updates=2) == expected
        assert idle(informative, 2, updates=2, inner_epochs=2) == 2 * expected
        assert idle(informative, 2, updates_by="forks") == [True, True, False]
    assert idle(informative, 1, updates=2) == [True, False] and idle(informative, 1) == [False]


@pytest.mark.parametrize(("limit", "messages"), [(1, 4), (400, 2), (10**6, 1)])
def test_gradients_are_averaged_bucket_by_bucket(monkeypatch, limit, messages):
    """A rank that learnt nothing counts as 0; the other rank here has thrice this one's gradient."""
    parameters = [torch.nn.Parameter(torch.randn(size)) for size in ((3, 5), (40,), (7,), (80,))]
    for parameter in parameters[:3]:
        parameter.grad = torch.randn_like(parameter)
    before = [parameter.grad.clone() for parameter in parameters[:3]]
    sent = []
    monkeypatch.setattr(distributed, "BUCKET", limit)
    monkeypatch.setattr(distributed.dist, "all_reduce", lambda flat: sent.append(flat.numel()) or flat.mul_(4))
    Ranks(0, 2, CPU).average_gradients(parameters)
    assert sum(sent) == 142 and len(sent) == messages
    assert all(torch.equal(p.grad, 2 * old) for p, old in zip(parameters, before, strict=False))
    assert not parameters[3].grad.any()
