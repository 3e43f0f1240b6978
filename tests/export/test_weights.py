"""Exported weights, loaded by diffusers, give the run's velocity and pictures; scale and precision are as told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from run_folders import ITERATION, run_folder
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_pipelines import BUILDERS, TEXTS, model_config, sample_config

from tempflow.__main__ import main
from tempflow.common.draws import EVALUATION, Draw
from tempflow.common.precision import DTYPES
from tempflow.export.names import FORMATS
from tempflow.export.subject import open_subject
from tempflow.export.writers import WRITERS
from tempflow.models.formats.layouts import SD3
from tempflow.models.formats.whole import read_source, write_transformer
from tempflow.models.load import load_policy
from tempflow.models.network.adapters import adapted_layers
from tempflow.models.weights.origin import Origin
from tempflow.records.rows import read_metrics

CPU = torch.device("cpu")
SINGLE = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def tiny_run(tiny, load_tiny, disturb, tmp_path):
    """name -> folder of a run of a tiny pipeline, and a policy with its averaged parameters."""

    def make(name, **model):
        policy = load_tiny(name, lora_alpha=6, **model)
        disturb(policy.trainable(), 0.1)
        settings = model_config(tiny(name), name, lora_alpha=6, **model)
        return run_folder(tmp_path / f"{name}_run", policy, settings, sample_config(name)), policy

    return make


@torch.no_grad()
def velocity(policy):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(len(TEXTS), *policy.latent_shape, generator=generator)
    return policy.velocity(latents, torch.full((len(TEXTS),), 0.6), policy.encode(TEXTS))


def assert_close(found, expected, base):
    """Equal to rounding, and far from what there was before training."""
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
    assert (expected - base).abs().max() > 1e-2


def deltas(policy):
    return {name: layer.get_delta_weight("default").detach() for name, layer in
            adapted_layers(policy.network.module).items()}  # fmt: skip


def export(run, to, *options) -> Path:
    assert main(["export", str(run), "--to", to, "--output", "out.safetensors", *options]) == 0
    return Path("out.safetensors")


def export_folder(run, to, *options) -> Path:
    assert main(["export", str(run), "--to", to, "--output", f"out_{to}", *options]) == 0
    return Path(f"out_{to}")


def test_every_format_has_a_writer():
    assert list(FORMATS) == list(WRITERS)


@pytest.mark.parametrize("name", BUILDERS)
def test_diffusers_loads_the_run_of_every_family(load_tiny, tiny_run, name):
    """load_lora_weights and from_pretrained, of the adapters and of the merged pipeline, at strength 1."""
    run, policy = tiny_run(name)
    expected, plain = velocity(policy), load_tiny(name)
    base = velocity(plain)
    plain.pipeline.load_lora_weights(export_folder(run, "diffusers"), adapter_name="trained")
    plain.pipeline.set_adapters("trained", 1.0)
    assert_close(velocity(plain), expected, base)
    merged = export_folder(run, "merged")
    DiffusionPipeline.from_pretrained(merged)
    again = load_policy(model_config(merged, name), sample_config(name), CPU)
    assert_close(velocity(again), expected, base)


def test_the_merged_pipeline_gives_the_pictures_of_the_run(run):
    """Those that its last evaluation kept, from the same noises, by plain diffusers."""
    pipeline = DiffusionPipeline.from_pretrained(export_folder(run, "merged"))
    pipeline.set_progress_bar_config(disable=True)
    prompts = read_metrics(run / "metrics.jsonl")[0]["picture_prompts"]
    latents = Draw.grid(42, EVALUATION, range(6), 1).initial_noise((4, 8, 8), CPU)[::2]
    images = pipeline(prompts, latents=latents, num_inference_steps=4, guidance_scale=1.0, height=16, width=16,
                      max_sequence_length=16, output_type="np").images  # fmt: skip
    strip = np.concatenate(list(images), axis=1) * 255
    kept = {step: np.asarray(Image.open(run / "pictures" / f"step_{step:06d}.png"), float) for step in (0, 4)}
    assert np.abs(strip - kept[4]).max() <= 1 and np.abs(kept[4] - kept[0]).max() > 20


@pytest.mark.parametrize("to", ["diffusers", "merged"])
def test_full_training_gives_a_transformer(tiny, load_tiny, tiny_run, to):
    run, policy = tiny_run("sd3", train="full")
    folder = export_folder(run, to)
    kind = type(policy.network.module)
    loaded = kind.from_pretrained(folder, subfolder="transformer").state_dict()
    trained = policy.network.module.state_dict()
    assert loaded.keys() == trained.keys() and all(torch.equal(loaded[name], trained[name]) for name in trained)
    assert (folder / "model_index.json").exists() == (to == "merged")


@pytest.mark.parametrize(("options", "times"), [
    ([], 1.0), (["--weights", "raw"], 2.0), (["--checkpoint", "best"], 0.5), (["--checkpoint", str(ITERATION)], 1.0),
    (["--checkpoint", "2", "--weights", "raw"], 1.0),
])  # fmt: skip
def test_checkpoint_and_weights_are_those_asked_for(tiny_run, options, times):
    """Adapters times t are a change times t squared."""
    run, policy = tiny_run("z_image")
    tensors = load_file(export(run, "comfyui", *options))
    for name, delta in deltas(policy).items():
        up, down = (tensors[f"diffusion_model.{name}.lora_{half}.weight"] for half in ("up", "down"))
        torch.testing.assert_close(up @ down, delta * times**2, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("to", "precision"), [("comfyui", "fp32"), ("kohya", "fp32"), ("comfyui", "bf16"),
                                               ("kohya", "fp16")])  # fmt: skip
def test_sd3_files_change_the_authors_weights_as_the_run_does(tiny_run, to, precision):
    """By ComfyUI's and sd-scripts' rule, whose query, key and value are one layer; diffusers reads no such file."""
    run, policy = tiny_run("sd3")
    tensors = load_file(export(run, to, "--dtype", precision))
    expected = {name: delta.double() for name, delta in deltas(policy).items()}
    rounding = {"fp32": 1e-6, "bf16": 1e-2, "fp16": 1e-3}[precision]
    layers = [(whole, parts, number) for whole, parts in SD3.stacked.items() for number in range(2)]
    seen = []
    for whole, parts, number in layers:
        name = whole.format(number)
        key = f"diffusion_model.{name}" if to == "comfyui" else f"lora_unet_{name.replace('.', '_')}"
        if f"{key}.alpha" in tensors:
            up, down, alpha = (tensors[f"{key}.{end}"] for end in ("lora_up.weight", "lora_down.weight", "alpha"))
            assert up.dtype == down.dtype == DTYPES[precision]
            delta = up.double() @ down.double() * alpha.item() / len(down)
            own = torch.cat([expected[part.format(number)] for part in parts])
            torch.testing.assert_close(delta, own, rtol=rounding, atol=rounding * own.abs().max().item())
            seen += [part.format(number) for part in parts]
    assert sorted(seen) == sorted(expected), "every layer once"
    assert len(tensors) == 3 * sum(key.endswith(".alpha") for key in tensors)


def test_merged_weights_are_rounded_once(tiny, tiny_run):
    run, policy = tiny_run("sd3")
    merged = load_file(export_folder(run, "merged", "--dtype", "bf16") / "transformer" / SINGLE)
    base = load_file(tiny("sd3") / "transformer" / SINGLE)
    changed = deltas(policy)
    assert merged.keys() == base.keys()
    for name, tensor in merged.items():
        change = changed.get(name.removesuffix(".weight"), 0.0) if name.endswith(".weight") else 0.0
        exact = base[name].double() + change
        assert tensor.dtype == torch.bfloat16
        torch.testing.assert_close(tensor.double(), exact, rtol=2**-8, atol=1e-7)
        assert (tensor == exact.bfloat16()).float().mean() > 0.99, name  # but for fp32's own rounding, near a tie


def test_large_weights_come_in_several_files(tiny_run):
    """As diffusers writes and reads them."""
    run, policy = tiny_run("flux")
    subject = open_subject(run, "last", "averaged", None)
    write_transformer(subject.source, subject.trained, Path("several"), torch.float32, shard=100_000)
    write_transformer(subject.source, subject.trained, Path("one"), torch.float32)
    files = sorted(Path("several").glob("*.safetensors"))
    assert len(files) > 3 and all(file.stat().st_size < 120_000 for file in files)
    index = json.loads(Path("several/diffusion_pytorch_model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    kind = type(policy.network.module)
    several, one = (kind.from_pretrained(folder).state_dict() for folder in ("several", "one"))
    assert all(torch.equal(several[name], tensor) for name, tensor in one.items())
    source = read_source(Path("several"), subject.trained, Origin("model.path", "several"))
    assert source.shapes.keys() == one.keys(), "a base in several files is read"


def test_second_copies_of_weights_and_foreign_files_stay_behind(tiny, tiny_run, tmp_path):
    """A base as the hub has it: a copy in fp16, files of other libraries, and links in place of files."""
    run, _ = tiny_run("sd3")
    base = shutil.copytree(tiny("sd3"), tmp_path / "base")
    for part in ("transformer", "vae"):
        (base / part / "diffusion_pytorch_model.fp16.safetensors").symlink_to(tiny("sd3") / part / SINGLE)
        (base / part / SINGLE).unlink()
        (base / part / SINGLE).symlink_to(tiny("sd3") / part / SINGLE)
    (base / "vae" / "weights.bin").write_bytes(b"pickle")
    (base / "sd3.safetensors").write_bytes(b"another program's")
    (base / "LICENSE.md").write_text("be kind")
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace(str(tiny("sd3")), str(base)))
    merged = export_folder(run, "merged")
    found = {str(file.relative_to(merged)) for file in merged.rglob("*") if file.is_file()}
    assert not any(file.is_symlink() for file in merged.rglob("*")) and f"vae/{SINGLE}" in found
    assert not {name for name in found if "fp16" in name or name.endswith(".bin") or name == "sd3.safetensors"}
    assert (merged / "LICENSE.md").read_text() == "be kind"
    DiffusionPipeline.from_pretrained(merged)


def test_weights_that_the_run_left_for_others_are_exported_too(run):
    """`final`: of adapters, whose file has another scale than a checkpoint."""
    own, final = (load_file(export(run, "kohya", "--force", *options)) for options in ([], ["--checkpoint", "final"]))
    assert own.keys() == final.keys()
    for name, tensor in own.items():
        torch.testing.assert_close(final[name], tensor)


def test_a_run_that_began_from_a_lora_that_is_gone(tiny, tiny_run, load_tiny, tmp_path):
    """Its change is counted from the base."""
    run, policy = tiny_run("qwen_image")
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("  lora: null", f"  lora: {tmp_path / 'gone'}"))
    plain = load_tiny("qwen_image")
    base = velocity(plain)
    plain.pipeline.load_lora_weights(export_folder(run, "diffusers", "--dtype", "fp32"), adapter_name="trained")
    plain.pipeline.set_adapters("trained", 1.0)
    assert_close(velocity(plain), velocity(policy), base)


def test_files_tell_what_they_are_and_can_be_read_by_others(run):
    file = export(run, "comfyui")
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt", "software": "tempflow", "iteration": "4", "weights": "averaged"}
    folder = export_folder(run, "diffusers")
    Path("ordinary").write_text("")
    usual = Path("ordinary").stat().st_mode
    assert {path.stat().st_mode for path in (file, *folder.iterdir())} == {usual}
