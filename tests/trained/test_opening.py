"""Opening a run: which parameters, which refusals; the model before training; a run that is going on."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tempflow.common.errors import BadInput
from tempflow.common.files import checksum
from tempflow.run import checkpoint as saved
from tempflow.run.lock import FolderLock
from tempflow.trained.opening import find_checkpoint, load_trained, load_untrained, open_run

CPU = torch.device("cpu")


@pytest.fixture
def copied(run, tmp_path) -> Path:
    return shutil.copytree(run, tmp_path / "copied")


def refused(field, *arguments):
    with pytest.raises(BadInput) as caught:
        open_run(*arguments)
    assert caught.value.field == field
    return caught.value.hint


@pytest.mark.parametrize(("checkpoint", "weights", "file"), [
    ("last", "averaged", "step_000004/average"), ("last", "raw", "step_000004/parameters"),
    (2, "averaged", "step_000002/average"), ("2", "raw", "step_000002/parameters"),
    ("final", "averaged", "step_000004/average"),
])  # fmt: skip
def test_a_checkpoint_holds_what_was_saved(run, checkpoint, weights, file):
    opened = open_run(run, checkpoint, weights)
    expected = load_file(run / "checkpoints" / f"{file}.safetensors")
    assert opened.parameters.keys() == expected.keys()
    assert all(torch.equal(opened.parameters[name], tensor) for name, tensor in expected.items())
    assert opened.iteration == int(file[10:11]) and opened.weights == weights and opened.folder == run
    assert opened.config.learn.lr == 1e-2


def test_best_is_the_one_with_the_best_gold(copied):
    kept = copied / "checkpoints"
    for name, iteration in (("step_000002", 2), ("step_000004", 4)):
        (kept / "best.json").write_text(json.dumps({"checkpoint": name, "gold": 0.5}))
        assert open_run(copied, "best").iteration == iteration
    (kept / "best.json").unlink()
    assert "2, 4" in refused("--checkpoint", copied, "best")


def test_a_policy_takes_the_parameters_and_gives_the_model_before_training(run):
    opened, untrained = open_run(run), load_untrained(open_run(run).config, CPU)
    loaded = load_trained(opened, CPU)
    policy = loaded.policy
    conditioning = policy.encode(["two red threes"])
    latents, sigma = torch.randn(1, *policy.latent_shape), torch.tensor([0.7])

    def velocity(of=policy):
        with torch.no_grad():
            return of.velocity(latents, sigma, conditioning)

    trained = velocity()
    with loaded.before_training():
        before = velocity()
    assert torch.equal(before, velocity(untrained.policy)) and not torch.equal(before, trained)
    assert torch.equal(velocity(), trained), "the parameters come back"
    with policy.merged():
        merged = velocity()
    torch.testing.assert_close(merged, trained, atol=1e-4, rtol=1e-4)
    loaded.place(open_run(run, 2))
    two = velocity()
    with policy.merged():
        torch.testing.assert_close(velocity(), two, atol=1e-4, rtol=1e-4)
    assert not torch.equal(two, trained)
    loaded.place(None)
    assert torch.equal(velocity(), before)


def test_all_parameters_and_the_final_transformer(full_run):
    opened, final = open_run(full_run), open_run(full_run, "final")
    loaded = load_trained(final, CPU)
    own = loaded.policy.trainable()
    assert all(torch.equal(own[name], tensor) for name, tensor in opened.parameters.items())
    with loaded.before_training():
        start = load_untrained(opened.config, CPU).start
        assert all(torch.equal(own[name], tensor) for name, tensor in start.items())
        assert any(not torch.equal(own[name], tensor) for name, tensor in opened.parameters.items())


def test_a_run_that_is_going_on_is_read_without_its_lock(copied):
    lock = FolderLock(copied)
    lock.take()
    try:
        assert open_run(copied).iteration == 4
    finally:
        lock.release()


def test_a_checkpoint_that_the_run_drops_meanwhile(copied, monkeypatch):
    """`last` is then the next one."""
    read, dropped = saved.read, []

    def reading(path, parts):
        if not dropped:
            dropped.append(path)
            shutil.rmtree(path)
        return read(path, parts)

    monkeypatch.setattr(saved, "read", reading)
    assert open_run(copied).iteration == 2 and dropped[0].name == "step_000004"


def test_settings_laid_on_the_runs_own(run):
    config = open_run(run, overrides=["eval.steps=3"]).config
    assert config.eval.steps == 3 and config.learn.lr == 1e-2


@pytest.mark.parametrize(("field", "checkpoint", "weights", "words"), [
    ("--checkpoint", 3, "averaged", "2, 4"), ("--checkpoint", "newest", "averaged", "2, 4"),
    ("--checkpoint", "-2", "averaged", "2, 4"), ("--weights", "last", "ema", "raw"),
    ("--weights", "final", "raw", "averaged"),
])  # fmt: skip
def test_what_there_is_not(run, field, checkpoint, weights, words):
    assert words in refused(field, run, checkpoint, weights)


def test_folders_without_a_run_or_weights(copied, tmp_path):
    refused("run", tmp_path / "nowhere")
    refused("run", tmp_path)
    refused("run", copied / "config.yaml")
    shutil.rmtree(copied / "checkpoints")
    assert "--checkpoint final" in refused("run", copied)
    assert open_run(copied, "final").iteration == 4
    (copied / "pytorch_lora_weights.safetensors").unlink()
    assert "no weights" in refused("run", copied) and "no weights" in refused("run", copied, "final")
    with pytest.raises(BadInput):
        find_checkpoint(copied, "last")


def altered(path: Path, change) -> None:
    """A checkpoint whose averaged weights are others, with the right checksums."""
    file = path / "average.safetensors"
    save_file(change(load_file(file)), file)
    sums = json.loads((path / "index.json").read_text())
    (path / "index.json").write_text(json.dumps(sums | {file.name: checksum(file)}))


def test_damaged_checkpoints(copied):
    path = copied / "checkpoints" / "step_000004"
    altered(path, lambda tensors: {name: tensor * torch.nan for name, tensor in tensors.items()})
    assert "finite" in refused("--checkpoint", copied) and open_run(copied, "last", "raw").iteration == 4
    file = path / "average.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    hint = refused("--checkpoint", copied)
    assert "checksum" in hint and hint.endswith("2"), "those that there are else"
    file.unlink()
    assert "missing" in refused("--checkpoint", copied, 4)
    (copied / "pytorch_lora_weights.safetensors").write_bytes(b"no weights")
    refused("--checkpoint", copied, "final")


@pytest.mark.parametrize("change", [
    lambda tensors: {f"other.{name}": tensor for name, tensor in tensors.items()},
    lambda tensors: {name: tensor[:, :1].contiguous() for name, tensor in tensors.items()},
])  # fmt: skip
def test_a_checkpoint_of_another_model(copied, change):
    altered(copied / "checkpoints" / "step_000004", change)
    with pytest.raises(BadInput) as caught:
        load_trained(open_run(copied), CPU)
    assert caught.value.field == "--checkpoint" and "step_000004" in str(caught.value)
