"""Precision, memory, and wrong settings of models."""

from __future__ import annotations

import inspect
import json
import shutil

import pytest
import tiny_pipelines
import torch
from diffusers.models.transformers import transformer_qwenimage
from tiny_pipelines import BUILDERS, SIZE, TEXTS, model_config, sample_config

from tempflow.common.errors import BadInput
from tempflow.learn.stepper import LossScale
from tempflow.models.load import load_policy, load_skeleton


def arguments(policy, rows=3):
    noise = torch.randn(rows, *policy.latent_shape, generator=torch.Generator().manual_seed(3))
    return noise, torch.linspace(0.9, 0.1, rows), policy.encode(TEXTS[:rows])


@pytest.mark.parametrize(
    ("name", "train"), [*((name, "lora") for name in BUILDERS), ("flux", "full"), ("z_image", "full")]
)
def test_reduced_precision(load_tiny, name, train):
    """Parts in their precisions; what is trained, latents and velocities in fp32; the merged copy follows."""
    exact = load_tiny(name, 2.0, train=train)
    policy = load_tiny(name, 2.0, train=train, dtype="bf16", text_dtype="fp32", vae_dtype="fp16")
    assert {p.dtype for p in policy.trainable().values()} == {torch.float32}
    assert all(encoder.dtype == torch.float32 for encoder in policy.texts.encoders)
    assert policy.pipeline.vae.dtype == torch.float16
    if train == "lora":
        assert {p.dtype for p in policy.network.module.parameters() if not p.requires_grad} == {torch.bfloat16}
    velocity = policy.velocity(*arguments(policy))
    assert velocity.dtype == torch.float32
    expected = exact.velocity(*arguments(exact))
    assert 0 < (velocity - expected).abs().max() < 0.2 * expected.abs().max()
    velocity.square().sum().backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in policy.trainable().values())
    with torch.no_grad(), policy.merged():
        assert {p.dtype for p in policy.network.active.parameters()} == {torch.bfloat16}
        assert (policy.velocity(*arguments(policy)) - expected).abs().max() < 0.2 * expected.abs().max()


def test_merged_copy_of_full_training_follows_in_place(load_tiny, disturb):
    policy = load_tiny("flux", train="full", dtype="bf16")
    with policy.merged():
        module = policy.network.active
    before = {name: (parameter.data_ptr(), parameter.clone()) for name, parameter in module.named_parameters()}
    disturb(policy.trainable(), 0.5)
    policy.refresh_merged()
    trained = policy.trainable()
    for name, parameter in module.named_parameters():
        place, value = before[name]
        assert parameter.data_ptr() == place and not torch.equal(parameter, value)
        assert torch.equal(parameter, trained[name].to(torch.bfloat16))


@pytest.mark.parametrize("name", list(BUILDERS))
def test_a_network_call_neither_reads_the_device_nor_sends_it_numbers(load_tiny, name, monkeypatch):
    """On a GPU the host would wait, and no CUDA graph could hold the call."""
    policy = load_tiny(name, 2.0)
    inputs = arguments(policy)
    expected = policy.velocity(*inputs)

    def refuse(*_, **__):
        raise AssertionError("the host waits for the device")

    for method in ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "numpy", "nonzero"):
        monkeypatch.setattr(torch.Tensor, method, refuse)
    for function in ("tensor", "as_tensor", "from_numpy"):
        monkeypatch.setattr(torch, function, refuse)
    found = policy.velocity(*inputs)
    monkeypatch.undo()
    assert torch.equal(found, expected)


def test_text_lengths_are_those_of_diffusers():
    """Ours stands in for it, in plain pipelines too."""
    source = inspect.getsource(transformer_qwenimage).split("def compute_text_seq_len_from_mask")[1].split("\ndef ")[0]
    space = {"torch": torch}
    exec("def theirs" + source.split("\n\n\n")[0], space)  # the module's own name leads to ours
    mask, embeds = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]]), torch.zeros(3, 4, 2)
    ours = transformer_qwenimage.compute_text_seq_len_from_mask
    for left, right in zip(ours(embeds, mask), space["theirs"](embeds, mask), strict=True):
        assert torch.equal(torch.as_tensor(left), torch.as_tensor(right))
    assert ours(embeds, None) == space["theirs"](embeds, None) == (4, None, None)


def test_small_gradients_survive_fp16(load_tiny):
    """A mean over a large latent gives gradients that fp16 rounds to 0, unless the loss is scaled."""
    gradients = []
    for precision, scale in (("fp32", 1.0), ("fp16", LossScale.START), ("fp16", 1.0)):
        policy = load_tiny("flux", dtype=precision)
        (policy.velocity(*arguments(policy)).square().mean() * 1e-6 * scale).backward()
        found = torch.cat([p.grad.flatten() for p in policy.trainable().values() if p.grad is not None])
        gradients.append(found / scale)
    exact, half, lost = gradients
    assert exact.abs().max() < 1e-6 and (half - exact).norm() < 0.05 * exact.norm()
    assert (lost - exact).norm() > 0.2 * exact.norm()


def test_checkpointing_changes_no_gradient(load_tiny):
    """Also where the family brings its own forward."""
    gradients = []
    for checkpointing in (False, True):
        policy = load_tiny("z_image", 2.0, gradient_checkpointing=checkpointing)
        policy.velocity(*arguments(policy)).square().sum().backward()
        gradients.append([p.grad for p in policy.trainable().values()])
    assert all(torch.equal(left, right) for left, right in zip(*gradients, strict=True))


def test_slices_and_tiles_decode(load_tiny):
    plain, sliced = load_tiny("flux"), load_tiny("flux", vae_slicing=True, vae_tiling=True)
    latents = arguments(plain)[0]
    assert sliced.pipeline.vae.use_slicing and sliced.pipeline.vae.use_tiling
    assert (plain.decode(latents).int() - sliced.decode(latents).int()).abs().max() <= 1


def test_a_pipeline_without_its_third_text_encoder_loads(tmp_path, cpu):
    pipeline = tiny_pipelines.sd3()
    pipeline.register_modules(text_encoder_3=None, tokenizer_3=None)
    pipeline.save_pretrained(tmp_path)
    policy = load_policy(model_config(tmp_path, "sd3"), sample_config("sd3"), cpu)
    assert len(policy.texts.encoders) == 2 and policy.encode(TEXTS).tensors["embeds"].shape == (3, 112, 32)


@pytest.mark.parametrize(
    ("name", "model", "sample", "words"),
    [
        ("flux", {"attention": "flash"}, {}, "model.attention=flash: not installed.*flash-attn"),
        ("flux", {"attention": "quick"}, {}, "model.attention=quick: no such backend.*native"),
        ("sd3", {"attention": "_native_cudnn"}, {}, "model.attention=_native_cudnn: not usable here"),
        ("z_image", {"attention": "_native_flash"}, {}, "model.attention=_native_flash: not usable.*mask"),
        ("flux", {}, {"height": 18}, "sample.height=18: .*multiples of 4"),
        ("qwen_image", {}, {"width": 6}, "sample.width=6: .*multiples of 4"),
        ("sd3", {}, {"width": 36}, "sample.width=36: .*at most 32"),
        ("z_image", {}, {"height": 132}, "sample.height=132: .*at most 128"),
        ("flux", {"text_tokens": 513}, {}, "model.text_tokens=513: .*at most 512"),
        ("z_image", {"lora_targets": ["attn.to_q"]}, {}, "model.lora_targets=.*attn.to_q"),
        ("flux2", {"lora_targets": ["transformer_blocks"]}, {}, "model.lora_targets=.*no linear layer"),
        ("flux", {"lora": "/nowhere/at/all"}, {}, "model.lora=/nowhere/at/all: .*does not load"),
    ],
)
def test_wrong_settings_are_refused(tiny, cpu, name, model, sample, words):
    with pytest.raises(BadInput, match=words) as caught:
        load_policy(model_config(tiny(name), name, **model), sample_config(name, size={**SIZE, **sample}), cpu)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "option"), [("flux2_klein", {"is_distilled": True}), ("flux", {"guidance_embeds": False})]
)
def test_distilled_models_take_no_guidance(tiny, tmp_path, cpu, name, option):
    folder = tmp_path / "distilled"
    shutil.copytree(tiny(name), folder)
    file = folder / ("model_index.json" if name == "flux2_klein" else "transformer/config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | option))
    with pytest.raises(BadInput, match=r"sample.guidance=2.0: this model is distilled"):
        load_skeleton(model_config(folder, name), sample_config(name, 2.0))
    assert load_skeleton(model_config(folder, name), sample_config(name)).network_rows == 1


@pytest.mark.parametrize(
    ("name", "model", "words"),
    [
        ("qwen_image", {}, "no layer of this transformer"),
        ("flux", {"lora_rank": 8}, "set model.lora_rank=4"),
        ("flux", {"lora_targets": ["attn.to_q"]}, "set model.lora_targets"),
    ],
)
def test_another_models_lora_is_refused(tiny, load_tiny, tmp_path, name, model, words):
    load_tiny("flux").save(tmp_path)
    with pytest.raises(BadInput, match=f"model.lora=.*{words}") as caught:
        load_skeleton(model_config(tiny(name), name, lora=str(tmp_path), **model), sample_config(name))
    assert "\n" not in str(caught.value)


def test_missing_weights_are_one_clear_line(tiny, tmp_path, cpu):
    folder = tmp_path / "torn"
    shutil.copytree(tiny("flux"), folder)
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(BadInput, match=r"model.path=.*does not load") as caught:
        load_policy(model_config(folder, "flux"), sample_config("flux"), cpu)
    assert "\n" not in str(caught.value)


def test_an_absent_hub_model_is_one_clear_line(cpu, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BadInput, match=r"model.path=nobody/nothing: .*the hub did not give it"):
        load_policy(model_config("nobody/nothing", "flux"), sample_config("flux"), cpu)
