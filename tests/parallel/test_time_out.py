"""A process that still waits for its scorer is not given up by those that wait for it."""

import pytest

from tempflow.parallel import ranks
from tempflow.train import main


class Joined(Exception):
    pass


def test_collectives_wait_longer_than_scorers_may_take(monkeypatch):
    """A first attempt of reward.timeout, then reward.patience: only after that does a process save and end."""
    seen = {}

    def join(backend, **options):
        seen.update(options)
        raise Joined

    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ranks.dist, "init_process_group", join)
    for arguments in (["run.plan_only=true"], ["run.plan_only=false"]):
        seen.clear()
        with pytest.raises(Joined):
            main(["digits", "run.device=cpu", "reward.patience=9000", "reward.timeout=700", *arguments])
        assert seen["timeout"].total_seconds() > 9700 + 600
