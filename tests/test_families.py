"""Every model family against the plain diffusers pipeline of its class, on tiny random pipelines."""

from __future__ import annotations

import pytest
import torch
from diffusers import DiffusionPipeline
from tiny_pipelines import BUILDERS, NONE, SIZE, TEXT_TOKENS, TEXTS, model_config, sample_config

from tempflow.models import load_skeleton
from tempflow.schedule import build_schedule
from tempflow.tail_engine import EagerEngine

NAMES = list(BUILDERS)
STEPS = 4


def our_latents(policy, noise):
    schedule = build_schedule(policy.sigmas(STEPS), "flow_sde", 0.7)
    latents, conditioning = noise.clone(), policy.encode(TEXTS)
    engine = EagerEngine(policy, schedule, rows=len(TEXTS))
    for step in range(STEPS):
        engine.advance(latents, step, conditioning, torch.arange(len(TEXTS)))
    return latents


def plain(folder) -> DiffusionPipeline:
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def their_output(pipeline, name, policy, noise, guidance):
    """Last latents and images (0 .. 1) of a plain pipeline's own call."""
    arguments = {"guidance_scale": guidance}
    if name == "qwen_image":
        arguments = {"true_cfg_scale": guidance, "negative_prompt": [" "] * len(TEXTS)}
    if name.startswith("flux2"):  # these take noise unpacked
        noise = noise.transpose(1, 2).unflatten(2, policy.family.grid)
    seen = {}

    def look(_, step, time, values):
        seen.update(values)
        return values

    _, height, width = policy.image_shape
    images = pipeline(prompt=list(TEXTS), latents=noise.clone(), num_inference_steps=STEPS, height=height, width=width,
                      max_sequence_length=TEXT_TOKENS[name], output_type="pt", callback_on_step_end=look,
                      **arguments).images  # fmt: skip
    return seen["latents"], images


def difference(left, right):
    return (left.float() - right.float()).abs().max().item()


def noise_for(policy):
    return torch.randn(len(TEXTS), *policy.latent_shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("guidance", "size"), [(None, SIZE), (3.5, {"height": 24, "width": 16})], ids=["none", "3.5"])
@pytest.mark.parametrize("name", NAMES)
def test_sampling_equals_the_plain_pipeline(tiny, load_tiny, name, guidance, size):
    """The same noise gives the same latents and images, for prompts of different lengths in one batch."""
    policy = load_tiny(name, guidance, size=size)
    noise = noise_for(policy)
    scale = NONE.get(name, 1.0) if guidance is None else guidance
    latents = our_latents(policy, noise)
    expected, pictures = their_output(plain(tiny(name)), name, policy, noise, scale)
    assert difference(latents, expected) < 2e-5 * max(1.0, scale)
    assert (latents - noise).abs().mean() > 0.05
    images = policy.decode(latents)
    assert images.shape == (3, *policy.image_shape) and images.dtype == torch.uint8
    assert difference(images, pictures * 255) <= 1
    assert policy.network_rows == (2 if guidance and name not in ("flux", "flux2") else 1)


@pytest.mark.parametrize("name", NAMES)
def test_guidance_text_and_time_matter(load_tiny, name):
    """What equality could not tell if the tiny network ignored it."""
    policy, guided = load_tiny(name), load_tiny(name, 3.5)
    latents, sigma = noise_for(policy), torch.full((3,), 0.7)
    velocity = policy.velocity(latents, sigma, policy.encode(TEXTS))
    assert difference(velocity, guided.velocity(latents, sigma, guided.encode(TEXTS))) > 1e-3
    assert difference(velocity, policy.velocity(latents, sigma, policy.encode(TEXTS[::-1]))) > 1e-4
    assert difference(velocity, policy.velocity(latents, sigma / 2, policy.encode(TEXTS))) > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_the_adapters_and_nothing_else(load_tiny, disturb, name):
    policy = load_tiny(name, 2.0)
    assert all(".lora_" in parameter for parameter in policy.trainable())
    disturb(policy.trainable(), 0.05)
    velocity = policy.velocity(noise_for(policy), torch.tensor([0.9, 0.5, 0.1]), policy.encode(TEXTS))
    velocity.square().sum().backward()
    reached = {key for key, p in policy.network.module.named_parameters() if p.grad is not None and p.grad.any()}
    silent = policy.trainable().keys() - reached
    assert reached <= policy.trainable().keys() and len(silent) < len(reached) / 2
    # The text stream of the last double block has no way to the image.
    last = f"transformer_blocks.{len(getattr(policy.network.module, 'transformer_blocks', [])) - 1}."
    assert all(key.startswith(last) and (".add_" in key or "add_out" in key or "_context" in key) for key in silent)


@pytest.mark.parametrize("name", NAMES)
def test_reference_is_the_base_model(tiny, load_tiny, disturb, name):
    """Adapters off, the network is the one in the pipeline's folder, to the bit; and they come on again."""
    policy, base = load_tiny(name, 2.0), load_tiny(name, 2.0)
    disturb(policy.trainable(), 0.05)
    arguments = noise_for(policy), torch.tensor([0.9, 0.5, 0.1]), policy.encode(TEXTS)
    with torch.no_grad():
        trained = policy.velocity(*arguments)
        base.network.module.disable_adapters()
        expected = base.velocity(*arguments)
        with policy.reference():
            assert torch.equal(policy.velocity(*arguments), expected)
        assert torch.equal(policy.velocity(*arguments), trained) and difference(trained, expected) > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_adapters_travel_to_plain_diffusers_and_back(tiny, load_tiny, disturb, tmp_path, name):
    policy = load_tiny(name)
    disturb(policy.trainable(), 0.1)
    noise = noise_for(policy)
    latents = our_latents(policy, noise)
    policy.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
    pipeline = plain(tiny(name))
    pipeline.load_lora_weights(tmp_path)
    expected, pictures = their_output(pipeline, name, policy, noise, NONE.get(name, 1.0))
    assert difference(latents, expected) < 2e-5 and difference(policy.decode(latents), pictures * 255) <= 1
    assert difference(latents, our_latents(load_tiny(name), noise)) > 1e-3
    again = load_tiny(name, lora=str(tmp_path))
    assert all(torch.equal(parameter, policy.trainable()[key]) for key, parameter in again.trainable().items())
    assert torch.equal(our_latents(again, noise), latents)


@pytest.mark.parametrize("name", NAMES)
def test_full_training_saves_a_transformer_that_loads(tiny, load_tiny, disturb, tmp_path, name):
    policy = load_tiny(name, train="full")
    noise = noise_for(policy)
    base = our_latents(policy, noise)
    assert policy.trainable().keys() == dict(policy.network.module.named_parameters()).keys()
    disturb(policy.trainable(), 0.02)
    policy.save(tmp_path)
    policy.save(tmp_path)  # over what is there
    pipeline = plain(tiny(name))
    kind = type(pipeline.transformer)
    pipeline.register_modules(transformer=kind.from_pretrained(tmp_path / "transformer"))
    latents = our_latents(policy, noise)
    assert difference(latents, their_output(pipeline, name, policy, noise, NONE.get(name, 1.0))[0]) < 2e-5
    assert [path.name for path in tmp_path.iterdir()] == ["transformer"] and difference(latents, base) > 1e-3
    with policy.reference():
        assert torch.equal(our_latents(policy, noise), base)


@pytest.mark.parametrize("name", NAMES)
def test_merged_copy_computes_the_adapted_velocity(load_tiny, disturb, name):
    """To rounding, as of its last refresh; its storage stays, and what has no adapter is shared."""
    policy = load_tiny(name, 2.0)
    arguments = noise_for(policy), torch.tensor([0.9, 0.5, 0.1]), policy.encode(TEXTS)

    @torch.no_grad()
    def velocities():
        with policy.merged():
            merged = policy.velocity(*arguments)
        return merged, policy.velocity(*arguments)

    disturb(policy.trainable(), 0.1)
    first, expected = velocities()
    assert difference(first, expected) < 2e-6 * expected.abs().max().clamp(min=1).item()
    with policy.merged():
        module = policy.network.active
    places = {key: parameter.data_ptr() for key, parameter in module.named_parameters()}
    disturb(policy.trainable(), 0.1)
    stale, expected = velocities()
    assert torch.equal(stale, first) and difference(stale, expected) > 1e-3
    policy.refresh_merged()
    merged, expected = velocities()
    assert difference(merged, expected) < 2e-6 * expected.abs().max().clamp(min=1).item()
    assert places == {key: parameter.data_ptr() for key, parameter in module.named_parameters()}
    shared = {parameter.data_ptr() for parameter in policy.network.module.parameters()}
    own = {key for key, place in places.items() if place not in shared}
    assert own == {key.replace(".lora_A.default", "") for key in policy.trainable() if ".lora_A." in key}
    assert not any(".lora_" in key for key in places)


@pytest.mark.parametrize("train", ["lora", "full"])
@pytest.mark.parametrize("name", NAMES)
def test_skeleton_has_the_figures_of_the_loaded_policy(tiny, load_tiny, name, train):
    precision = {"dtype": "bf16", "text_dtype": "fp32", "vae_dtype": "fp16", "train": train}
    policy = load_tiny(name, 2.0, keep_reference=False, **precision)
    skeleton = load_skeleton(model_config(tiny(name), name, **precision), sample_config(name, 2.0))
    assert skeleton.latent_shape == policy.latent_shape and skeleton.image_shape == policy.image_shape
    assert skeleton.network_rows == policy.network_rows and torch.equal(skeleton.sigmas(5), policy.sigmas(5))
    components = policy.pipeline.components
    text = [part for key, part in components.items() if key.startswith("text_encoder")]
    held = {"transformer": [policy.network.module], "vae": [components["vae"]], "text": text}
    parameters = {part: [p for module in modules for p in module.parameters()] for part, modules in held.items()}
    parameters["trainable"] = list(policy.trainable().values())
    with policy.merged():
        shared = {p.data_ptr() for p in policy.network.module.parameters()}
        parameters["merged"] = [p for p in policy.network.active.parameters() if p.data_ptr() not in shared]
    for part, tensors in parameters.items():
        found = skeleton.parts[part]
        assert found.parameters == sum(p.numel() for p in tensors), part
        assert found.bytes == sum(p.nbytes for p in tensors), part
