"""The shipped pipeline against plain diffusers: same latents, same images, adapters that travel."""

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

from tempflow.common.draws import Draw
from tempflow.common.errors import BadInput
from tempflow.common.files import resolve
from tempflow.explore.schedule import build_schedule
from tempflow.explore.tails.engine import EagerEngine
from tempflow.models.load import load_policy
from tempflow.settings.fields import ModelConfig, SampleConfig

PIPELINE = resolve("tempflow:digits/pipeline")
TEXTS = ["a seven at the top left and a three at the bottom right", "three fours", "a one above a nine"]


def plain_pipeline() -> StableDiffusion3Pipeline:
    pipeline = StableDiffusion3Pipeline.from_pretrained(PIPELINE)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def our_latents(policy, noise, steps):
    schedule = build_schedule(policy.sigmas(steps), "flow_sde", 0.7)
    latents, conditioning = noise.clone(), policy.encode(TEXTS)
    EagerEngine(policy, rows=len(TEXTS)).finish(latents, [0] * len(TEXTS), conditioning, schedule)
    return latents


def their_output(pipeline, noise, steps, guidance, output_type, **size):
    return pipeline(TEXTS, latents=noise.clone(), num_inference_steps=steps, guidance_scale=guidance,
                    max_sequence_length=16, output_type=output_type, **size).images  # fmt: skip


@pytest.mark.parametrize("guidance", [1.0, 3.5])
@pytest.mark.parametrize("size", [(16, 16), (16, 8)])
def test_sampling_equals_the_plain_pipeline(cpu, guidance, size):
    height, width = size
    sample = SampleConfig(guidance=guidance, height=height, width=width)
    policy = load_policy(ModelConfig(text_tokens=16), sample, cpu)
    assert policy.latent_shape == (4, height // 2, width // 2) and policy.network_rows == (2 if guidance > 1 else 1)
    noise = torch.randn(3, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        policy.network.module.disable_adapters()
        theirs = their_output(plain_pipeline(), noise, 6, guidance, "latent", height=height, width=width)
        ours = our_latents(policy, noise, 6)
    assert (ours - theirs).abs().max() < 2e-5 * max(1.0, guidance)


def test_adapters_load_into_plain_diffusers_and_give_the_same_images(digits_policy, tmp_path):
    """`load_lora_weights` of an unmodified pipeline reproduces our sampler's images, alpha / rank scaling included."""
    digits_policy.save(tmp_path)
    assert (tmp_path / "pytorch_lora_weights.safetensors").is_file()
    noise = torch.randn(3, *digits_policy.latent_shape)
    pipeline = plain_pipeline()
    before = their_output(pipeline, noise, 6, 1.0, "np")
    pipeline.load_lora_weights(tmp_path)
    after = their_output(pipeline, noise, 6, 1.0, "np")
    ours = digits_policy.decode(our_latents(digits_policy, noise, 6))
    theirs = torch.from_numpy((after * 255).round().astype("uint8")).permute(0, 3, 1, 2)
    assert (ours.int() - theirs.int()).abs().max() <= 1
    assert abs(before - after).max() > 0.05


def test_full_training_saves_a_transformer_that_loads(cpu, tmp_path, disturb):
    torch.manual_seed(0)
    policy = load_policy(ModelConfig(train="full", text_tokens=16), SampleConfig(), cpu)
    assert all(parameter.requires_grad for parameter in policy.network.module.parameters())
    disturb(policy.trainable(), 0.01)
    policy.save(tmp_path)
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        PIPELINE, transformer=SD3Transformer2DModel.from_pretrained(tmp_path / "transformer")
    )
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(3, *policy.latent_shape)
    ours, theirs = our_latents(policy, noise, 4), their_output(pipeline, noise, 4, 1.0, "latent")
    assert (ours - theirs).abs().max() < 2e-5
    plain = our_latents(load_policy(ModelConfig(text_tokens=16), SampleConfig(), cpu), noise, 4)
    with policy.reference():
        assert torch.equal(our_latents(policy, noise, 4), plain)
    assert (ours - plain).abs().max() > 1e-3


def test_reduced_precision_keeps_latents_and_adapters_in_fp32(cpu):
    policy = load_policy(ModelConfig(dtype="bf16", text_tokens=16), SampleConfig(), cpu)
    assert {parameter.dtype for parameter in policy.trainable().values()} == {torch.float32}
    frozen = {p.dtype for p in policy.network.module.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16}
    noise = Draw.grid(0, 0, range(3), 1).initial_noise(policy.latent_shape)
    exact = our_latents(load_policy(ModelConfig(text_tokens=16), SampleConfig(), cpu), noise, 4)
    rough = our_latents(policy, noise, 4)
    assert rough.dtype == torch.float32 and (rough - exact).abs().mean() < 0.1
    assert policy.decode(rough).dtype == torch.uint8


def test_gradient_checkpointing_changes_nothing(cpu):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        config = ModelConfig(gradient_checkpointing=checkpointing, text_tokens=16)
        policy = load_policy(config, SampleConfig(), cpu)
        latents = torch.linspace(-1, 1, 512).view(2, 4, 8, 8)
        policy.velocity(latents, torch.tensor([0.9, 0.4]), policy.encode(TEXTS[:2])).square().sum().backward()
        gradients.append([parameter.grad for parameter in policy.trainable().values()])
    for left, right in zip(*gradients, strict=True):
        assert torch.equal(left, right)


def test_dynamic_shift_is_the_schedulers_own(digits_policy):
    scheduler = digits_policy.pipeline.scheduler
    scheduler.register_to_config(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256,
                                 max_image_seq_len=4096, shift=1.0)  # fmt: skip
    seen = []

    def look(pipeline, step, time, values):
        seen.extend(pipeline.scheduler.sigmas.tolist() if step == 0 else [])
        return values

    digits_policy.pipeline(TEXTS[:1], num_inference_steps=5, guidance_scale=1.0, callback_on_step_end=look)
    assert digits_policy.sigmas(5).tolist() == pytest.approx(seen)


def test_shipped_pipeline_names_no_folder_of_its_maker():
    for path in PIPELINE.rglob("*.json"):
        assert "_name_or_path" not in path.read_text(encoding="utf-8"), path


@pytest.mark.parametrize(
    ("model", "sample", "field"),
    [
        ({"path": "nowhere/at/all"}, {}, "model.path"),
        ({"path": "tempflow:digits/prompts"}, {}, "model.path"),
        ({"lora_targets": ["attn.to_q", "attn.to_z"]}, {}, "model.lora_targets"),
        ({}, {"height": 18}, "sample.height"),
        ({}, {"width": 7}, "sample.width"),
        ({}, {"width": 32}, "sample.width"),
    ],
)
def test_wrong_models_are_refused(cpu, model, sample, field):
    with pytest.raises(BadInput) as caught:
        load_policy(ModelConfig(**model), SampleConfig(**sample), cpu)
    assert caught.value.field == field and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("index", "words"),
    [('{"_class_name": "SanaPipeline"}', "supported are StableDiffusion3Pipeline, Fl"), ("{", "no readable JSON"),
     ("{}", "no pipeline class"), ('{"_class_name": "StableDiffusion3Pipeline"}', "names no transformer")],
)  # fmt: skip
def test_wrong_pipelines_are_refused(cpu, tmp_path, index, words):
    (tmp_path / "model_index.json").write_text(index)
    with pytest.raises(BadInput, match=words):
        load_policy(ModelConfig(path=str(tmp_path)), SampleConfig(), cpu)
