"""Optimizer steps over ranks: which of them have nothing to learn, and gradients averaged bucket by bucket."""

from types import SimpleNamespace

import pytest
import torch

from tempflow.parallel import ranks as distributed
from tempflow.parallel.ranks import Ranks
from tempflow.run.trainer import Run
from tempflow.settings.fields import LearnConfig

CPU = torch.device("cpu")


def idle(weights: torch.Tensor, ranks: int, **learn) -> list[bool]:
    run = SimpleNamespace(config=SimpleNamespace(learn=LearnConfig(**learn)), ranks=SimpleNamespace(size=ranks))
    return Run.idle_updates(run, weights)


def test_an_update_is_idle_where_no_rank_learns():
    """8 trunks on 2 ranks, 2 updates: the first takes trunks 0 1 of rank 0 and 4 5 of rank 1."""
    weights = torch.zeros(3, 8)
    assert idle(weights, 2, updates=2) == [True, True]
    assert idle(weights, 2, updates=2, kl=0.1) == [False, False]
    for trunk, expected in ((1, [False, True]), (4, [False, True]), (3, [True, False]), (6, [True, False])):
        weights.zero_()[2, trunk] = 0.5
        assert idle(weights, 2, updates=2) == expected
    assert idle(weights, 1, updates=2) == [True, False] and idle(weights, 1) == [False]


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
