"""Which decisions an optimizer step learns from: cuts, batches, shares, and steps that have nothing to learn."""

import pytest
import torch
from rollout_cases import explored, forked

from tempflow.credit.advantage import Credit
from tempflow.learn.batches import cuts, updates
from tempflow.learn.objective import PRODUCT, WEIGHT, make_objective
from tempflow.settings.fields import LearnConfig, ObjectiveConfig

OWN = range(6)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(8)


def credit_of(advantages, informative=None) -> Credit:
    known = torch.ones(advantages.shape[:2], dtype=torch.bool) if informative is None else informative
    return Credit(advantages, known, known.numel(), int((~known).sum()))


class Case:
    """A rollout of 6 trunks, and everything that `updates` wants besides."""

    def __init__(self, policy, processes=1, idle="keep", kl=0.0, **explore):
        self.schedule, self.plan, rule = forked(**{"forks": [0, 2, 5], "siblings": 4} | explore)
        self.rollout = explored(policy, self.schedule, self.plan)
        self.objective = make_objective(ObjectiveConfig(kl=kl), self.schedule, rule.trained(), idle)
        self.advantages = torch.randn(self.plan.forks, 6 * processes, self.plan.siblings)
        self.informative = torch.ones(self.plan.forks, 6 * processes, dtype=torch.bool)

    def updates(self, own=OWN, **learn):
        credit = credit_of(self.advantages, self.informative)
        return list(updates(self.rollout, credit, self.objective, LearnConfig(**{"rows": 2} | learn), own))


def test_updates_hold_every_fork_once_with_all_siblings(toy):
    case = Case(toy)
    found = case.updates(updates=3)
    assert [len(update.batches) for update in found] == [3, 3, 3] and not any(update.idle for update in found)
    assert all(sum(batch.share for batch in update.batches) == pytest.approx(1) for update in found)
    seen = torch.cat([batch.advantages for update in found for batch in update.batches])
    assert seen.shape == (18, 4)
    assert sorted(seen.tolist()) == sorted(case.advantages.view(18, 4).tolist())
    batch, decision = found[1].batches[2], case.rollout.decisions[2]
    assert batch.steps.tolist() == [5, 5] and torch.equal(batch.latents, decision.latents[2:4])
    assert torch.equal(batch.keys, decision.keys[2:4]) and torch.equal(batch.velocity_old, decision.velocity[2:4])
    assert torch.equal(batch.advantages, case.advantages[2, 2:4])
    assert torch.equal(batch.terms, case.objective.terms[[5, 5]].float())
    assert torch.equal(batch.conditioning.tensors["shift"], case.rollout.conditioning.tensors["shift"][2:4])


@pytest.mark.parametrize(("updates_by", "forks"), [("trunks", [[0, 1, 2]]), ("forks", [[0], [1], [2]])])
def test_an_optimizer_step_takes_all_forks_or_one(updates_by, forks):
    found = cuts(6, 3, LearnConfig(updates=2, updates_by=updates_by))
    expected = [(trunks, group) for trunks in ([0, 1, 2], [3, 4, 5]) for group in forks]
    assert [(list(cut.trunks), list(cut.forks)) for cut in found] == expected


def test_steps_by_forks_learn_from_one_fork_each(toy):
    case = Case(toy, window=2)
    found = case.updates(updates=1, updates_by="forks")
    assert [sorted({int(step) for batch in update.batches for step in batch.steps}) for update in found] == [
        [0, 1], [2, 3], [5, 6],
    ]  # fmt: skip
    for fork, update in enumerate(found):
        assert sum(batch.share for batch in update.batches) == pytest.approx(1)
        advantages = torch.cat([batch.advantages for batch in update.batches if batch.steps[0] == (0, 2, 5)[fork]])
        assert torch.equal(advantages, case.advantages[fork])


@pytest.mark.parametrize("rows", [1, 2, 3, 6])
@pytest.mark.parametrize("siblings", [1, 4])
def test_every_decision_of_a_window_weighs_alike(toy, siblings, rows):
    """Rows that carry all siblings and later rows of one each: shares go by branches, and sum to 1."""
    case = Case(toy, window=3, siblings=siblings)
    for update in case.updates(rows=rows, updates=2 if rows in (1, 3) else 1):
        assert sum(batch.share for batch in update.batches) == pytest.approx(1)
        branches = sum(batch.advantages.numel() for batch in update.batches)
        for batch in update.batches:
            assert batch.share == pytest.approx(batch.advantages.numel() / branches) and len(batch.latents) <= rows
            assert len(batch.latents) == len(batch.keys) == len(batch.terms) == len(batch.advantages)


def test_a_branchs_advantage_belongs_to_every_decision_of_its_window(toy):
    """Each row of a batch is a row of its decision, with its own branch's advantage."""
    case = Case(toy, window=3)
    case.informative[1, 3] = False
    seen = {}
    for batch in case.updates()[0].batches:
        for row in range(len(batch.latents)):
            seen[batch.latents[row].flatten().tolist().__repr__()] = (batch.advantages[row], batch.terms[row])
    for decision in case.rollout.decisions:
        wide = decision.siblings == 4
        for row, latents in enumerate(decision.latents):
            trunk = row if wide else row // 4
            advantages, terms = seen.pop(latents.flatten().tolist().__repr__(), (None, None))
            if (decision.fork, trunk) == (1, 3) and advantages is None:
                continue
            own = case.advantages[decision.fork, trunk]
            assert torch.equal(advantages, own if wide else own[row % 4 : row % 4 + 1])
            assert (terms[WEIGHT] == 0) == ((decision.fork, trunk) == (1, 3)) and terms[PRODUCT] != 0
    assert not seen


def test_forks_of_each_prompt_have_the_terms_of_their_own_steps(toy):
    case = Case(toy, take=1, draw="prompt", forks=[0, 2, 3, 5])
    (update,) = case.updates(rows=6)
    (batch,) = update.batches
    assert batch.steps.tolist() == case.plan.trunk_steps()[0].tolist() and len(batch.steps.unique()) > 1
    assert torch.equal(batch.terms, case.objective.terms[batch.steps].float())


def test_masked_batches_are_left_out_unless_kl_needs_them(toy):
    for kl, idle, count in ((0.0, "keep", 8), (0.1, "keep", 9), (0.1, "drop", 8)):
        case = Case(toy, kl=kl, idle=idle)
        case.informative[1, 2:4] = False
        (update,) = case.updates()
        assert len(update.batches) == count and not update.idle
        factor = 18 / 16 if idle == "drop" else 1.0
        assert all(batch.share == pytest.approx(factor / 9) for batch in update.batches)


def test_one_masked_group_leaves_the_rest_of_its_batch(toy):
    case = Case(toy)
    case.informative[1, 2] = False
    (update,) = case.updates()
    assert len(update.batches) == 9
    batch = next(batch for batch in update.batches if torch.equal(batch.advantages, case.advantages[1, 2:4]))
    assert batch.terms[:, WEIGHT].tolist() == [0.0, pytest.approx(case.objective.terms[2, WEIGHT].item())]


def test_inner_epochs_repeat_the_updates(toy):
    found = Case(toy).updates(rows=3, updates=2, inner_epochs=3)
    assert len(found) == 6
    for first, second in zip(found[:2], found[2:4], strict=True):
        for one, other in zip(first.batches, second.batches, strict=True):
            assert torch.equal(one.latents, other.latents) and torch.equal(one.advantages, other.advantages)


def test_an_update_is_idle_where_no_process_learns(toy):
    """12 trunks on 2 processes, 3 updates: the second takes trunks 2 3 of the first process and 8 9 of the other."""
    case = Case(toy, processes=2)
    case.informative[:] = False

    def idle(own=OWN, **learn):
        return [update.idle for update in case.updates(own, **{"updates": 3} | learn)]

    assert idle() == [True, True, True] == idle(range(6, 12))
    assert idle(inner_epochs=2) == [True] * 6 and idle(updates_by="forks") == [True] * 9
    for trunk, update in ((1, 0), (6, 0), (2, 1), (9, 1), (5, 2), (11, 2)):
        case.informative[:] = False
        case.informative[2, trunk] = True
        expected = [number != update for number in range(3)]
        assert idle() == expected == idle(range(6, 12))
        assert idle(inner_epochs=2) == expected * 2
        by_fork = [(number, fork) != (update, 2) for number in range(3) for fork in range(3)]
        assert idle(updates_by="forks") == by_fork
    assert idle(updates=1) == [False]


@pytest.mark.parametrize(("kl", "idle", "expected"), [(0.0, "keep", True), (0.1, "keep", False), (0.1, "drop", True)])
def test_idle_groups_teach_nothing_but_the_kl_they_keep(toy, kl, idle, expected):
    case = Case(toy, kl=kl, idle=idle)
    case.informative[:] = False
    (update,) = case.updates()
    assert update.idle == expected == (not update.batches)
