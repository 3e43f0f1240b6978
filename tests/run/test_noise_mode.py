"""Exact or fast noise: who decides, what is refused, what folder and checkpoint keep, and that processes agree."""

import json

import pytest
import tempflow_kernels
import torch

from tempflow.common.errors import BadInput
from tempflow.common.files import checksum
from tempflow.parallel.ranks import Ranks
from tempflow.run import assembly
from tempflow.run.checkpoint import INDEX
from tempflow.run.noise_mode import VARIABLE, choose_mode, settle_mode
from tempflow.settings.reading import read_values
from tempflow.train import main

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SMALL = ["digits", "explore.prompts=2", "explore.noises=1", "explore.siblings=2", "explore.forks=[0]", "learn.rows=1",
         "sample.steps=3", "learn.iterations=1", "prompts.test=null", "run.trackers=[]", "run.device=cpu"]  # fmt: skip


@pytest.mark.parametrize(("setting", "saved", "variable", "device", "expected"), [
    ("auto", None, None, GPU, "fast"),
    ("auto", None, None, CPU, "exact"),
    ("auto", None, "exact", GPU, "exact"),
    ("auto", None, "fast", CPU, "exact"),
    ("auto", "exact", "fast", GPU, "exact"),
    ("auto", "fast", "exact", GPU, "fast"),
    ("auto", "fast", None, CPU, "exact"),
    ("exact", "fast", "fast", GPU, "exact"),
    ("fast", "exact", "exact", GPU, "fast"),
])  # fmt: skip
def test_setting_then_checkpoint_then_environment_then_device(monkeypatch, setting, saved, variable, device, expected):
    monkeypatch.delenv(VARIABLE, raising=False)
    if variable:
        monkeypatch.setenv(VARIABLE, variable)
    assert choose_mode(setting, saved, device) == expected


@pytest.mark.parametrize(("setting", "saved", "device", "said"), [
    ("fast", "exact", GPU, True), ("auto", "fast", CPU, True),
    ("auto", "exact", GPU, False), ("fast", None, GPU, False),
])  # fmt: skip
def test_another_mode_than_the_checkpoints_is_said_in_a_line(capsys, setting, saved, device, said):
    choose_mode(setting, saved, device)
    line = capsys.readouterr().err
    assert (line.count("\n") == 1 and "run.noise" in line and saved in line) if said else not line


def sign_anew(file):
    """Puts the checksum of a checkpoint's file into its index."""
    index = file.with_name(INDEX)
    index.write_text(json.dumps(json.loads(index.read_text()) | {file.name: checksum(file)}))


def test_fast_noise_on_a_cpu_is_refused(tmp_path, capsys):
    assert main([*SMALL, f"run.dir={tmp_path / 'run'}", "run.noise=fast"]) == 2
    assert "run.noise" in capsys.readouterr().err.splitlines()[-1] and not (tmp_path / "run").exists()


def test_processes_that_would_draw_differently_stop():
    class Two(Ranks):
        def gather(self, values, dim):
            return torch.cat([values, 1 - values], dim)

    with pytest.raises(BadInput) as caught:
        settle_mode("auto", None, Two(0, 2, CPU))
    assert caught.value.field == "run.noise"


def test_the_mode_is_set_before_anything_is_drawn_and_kept(tmp_path, monkeypatch):
    """In the settings of the folder and in the checkpoint, and a resumed run is given the checkpoint's."""
    happened, engines = [], assembly.choose_engines
    monkeypatch.setattr(tempflow_kernels, "use_noise", lambda mode: happened.append(mode), raising=False)
    monkeypatch.setattr(assembly, "choose_engines", lambda *given: (happened.append("engines"), engines(*given))[1])
    folder = tmp_path / "run"
    assert main([*SMALL, f"run.dir={folder}"]) == 0
    assert happened == ["exact", "engines"]
    assert read_values(str(folder / "config.yaml"))["run"]["noise"] == "exact"
    state = folder / "checkpoints" / "step_000001" / "state.json"
    saved = json.loads(state.read_text())
    assert saved["progress"]["noise"] == "exact"
    saved["progress"]["noise"] = "fast"
    state.write_text(json.dumps(saved))
    sign_anew(state)
    seen, settle = [], assembly.settle_mode
    monkeypatch.setattr(assembly, "settle_mode", lambda *given: (seen.append(given[:2]), settle(*given))[1])
    assert main([*SMALL, f"run.dir={folder}", "run.resume=true", "learn.iterations=2"]) == 0
    assert seen == [("auto", "fast")]
    later = json.loads((folder / "checkpoints" / "step_000002" / "state.json").read_text())
    assert later["progress"]["noise"] == "exact", "what served, not what was saved"


def test_a_checkpoint_that_does_not_say_was_learnt_with_exact_noise(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    assert main([*SMALL, f"run.dir={folder}"]) == 0
    state = folder / "checkpoints" / "step_000001" / "state.json"
    saved = json.loads(state.read_text())
    del saved["progress"]["noise"]
    state.write_text(json.dumps(saved))
    sign_anew(state)
    seen, settle = [], assembly.settle_mode
    monkeypatch.setattr(assembly, "settle_mode", lambda *given: (seen.append(given[:2]), settle(*given))[1])
    assert main([*SMALL, f"run.dir={folder}", "run.resume=true", "learn.iterations=2"]) == 0
    assert seen == [("auto", "exact")]
