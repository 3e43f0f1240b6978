"""What becomes of a level that fails, of settings it cannot serve, and of the engine of evaluation."""

import pytest
import torch

from tempflow.common.capture import CudaGraphs
from tempflow.common.errors import BadInput
from tempflow.explore.tails import compiled
from tempflow.explore.tails import levels as tail_levels
from tempflow.explore.tails.choose import check_tail_settings
from tempflow.explore.tails.levels import Level, make_engines
from tempflow.explore.tails.recorded import Direct
from tempflow.settings.fields import TailConfig

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_a_wait_for_the_host_is_found_before_the_capture(cuda):
    """So that the allocator is as it was, and another level may be tried in the same process."""
    with pytest.raises(RuntimeError, match="synchronizing"):
        CudaGraphs(CPU).record(cuda.wait_for_the_host)
    assert not cuda.broken and cuda.mode == 0


def breaks_inside(cuda):
    """Work that nothing betrays before it is captured."""

    def work():
        cuda.invalid |= cuda.capturing

    return work


def served(toy, monkeypatch, first):
    """The levels of a GPU on the toy, the first of which has a recorder of its own."""
    monkeypatch.setitem(tail_levels.LEVELS, "compiled_graph", Level(False, lambda device: first, "compile"))
    monkeypatch.setattr(tail_levels, "AUTO", {"cpu": ("compiled_graph", "compile", "graph", "eager")})
    return lambda schedule, **tails: make_engines(toy, TailConfig(**tails), 4, schedule, "one")


class Around:
    """A recorder that records other work than it is given."""

    def __init__(self, recorder, work):
        self.recorder, self.work = recorder, work

    def record(self, work):
        return self.recorder.record(self.work)


def test_nothing_is_tried_after_a_broken_capture(toy, schedule, cuda, monkeypatch, capsys):
    make = served(toy, monkeypatch, Around(CudaGraphs(CPU), breaks_inside(cuda)))
    with pytest.raises(BadInput) as caught:
        make(schedule)
    assert cuda.broken and (caught.value.field, caught.value.value) == ("tails.level", "auto")
    assert "tails.level=compile" in caught.value.hint and "\n" not in str(caught.value)
    assert capsys.readouterr().err == ""


def test_too_little_memory_within_a_capture_breaks_nothing(toy, schedule, cuda, monkeypatch, capsys):
    """torch ends such a capture in order; the next level is tried."""

    def work():
        if cuda.capturing:
            raise torch.OutOfMemoryError("CUDA out of memory")

    assert served(toy, monkeypatch, Around(CudaGraphs(CPU), work))(schedule).level == "compile"
    assert not cuda.broken and "out of memory" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["fp8", "autotune"])
def test_what_needs_compilation_is_refused_without(toy, schedule, name, monkeypatch):
    """Asked for so, on a CPU by auto, and where auto has come down to a level without."""
    for level, device in (("eager", GPU), ("graph", GPU), ("auto", CPU)):
        with pytest.raises(BadInput) as caught:
            check_tail_settings(TailConfig(level=level, **{name: True}), 2, device)
        assert caught.value.field == f"tails.{name}" and "tails.level=compile" in caught.value.hint
    for level in ("auto", "compile", "compiled_graph"):
        check_tail_settings(TailConfig(level=level, **{name: True}), 2, GPU)
    monkeypatch.setitem(tail_levels.LEVELS, "compile", Level(True, lambda device: Fails()))
    monkeypatch.setattr(tail_levels, "AUTO", {"cpu": ("compile", "eager")})
    with pytest.raises(BadInput) as caught:
        make_engines(toy, TailConfig(**{name: True}), 4, schedule, "one")
    assert caught.value.field == f"tails.{name}"


class Fails:
    def record(self, work):
        raise RuntimeError("no compiler")


def test_evaluation_is_recorded_at_its_first_use_only(toy, schedule, strict_recorder, monkeypatch):
    monkeypatch.setitem(tail_levels.LEVELS, "compile", Level(True, lambda device: strict_recorder))
    engines = make_engines(toy, TailConfig(level="compile"), 4, schedule, "one")
    assert strict_recorder.recorded == 1 and engines.evaluate.rows == 4
    for _ in range(2):
        engines.evaluate.finish(torch.zeros(2, 2, 3), [0, 0], toy.encode(["a", "b"]), schedule)
        assert strict_recorder.recorded == 2


def test_a_failure_at_the_first_evaluation_is_as_clear(toy, schedule, monkeypatch):
    class Once(Direct):
        def record(self, work):
            recorders.append(self)
            if len(recorders) > 1:
                raise RuntimeError("no room")
            return super().record(work)

    recorders = []
    monkeypatch.setitem(tail_levels.LEVELS, "compile", Level(True, lambda device: Once()))
    engines = make_engines(toy, TailConfig(level="compile"), 4, schedule, "one")
    with pytest.raises(BadInput) as caught:
        engines.evaluate.finish(torch.zeros(1, 2, 3), [0], toy.encode(["a"]), schedule)
    assert caught.value.field == "tails.level" and "no room" in caught.value.hint


@pytest.mark.parametrize("autotune", [True, False])
def test_autotune_is_torch_compiles_mode(toy, schedule, monkeypatch, autotune):
    modes, blocks = [], [torch.nn.Linear(2, 2)]
    monkeypatch.setattr(toy, "blocks", lambda: blocks)
    monkeypatch.setattr(torch, "compile", lambda forward, **options: modes.append(options.get("mode")) or forward)
    make_engines(toy, TailConfig(level="compile", autotune=autotune), 4, schedule, "one")
    assert modes == [compiled.AUTOTUNED if autotune else None]
