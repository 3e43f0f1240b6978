"""Every model family against the plain diffusers pipeline of its class, on tiny random pipelines."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from diffusers import DiffusionPipeline
from tiny_pipelines import BUILDERS, NONE, SIZE, TEXT_TOKENS, TEXTS, model_config, sample_config
from torch import Tensor

from tempflow.explore.schedule import build_schedule
from tempflow.explore.tails.engine import EagerEngine
from tempflow.models.load import load_policy, load_skeleton
from tempflow.models.pipeline import PipelinePolicy
from tempflow.records.rows import read_metrics
from tempflow.train import main

NAMES = list(BUILDERS)
STEPS = 4


def our_latents(policy, noise):
    schedule = build_schedule(policy.sigmas(STEPS), "flow_sde", 0.7)
    latents, conditioning = noise.clone(), policy.encode(TEXTS)
    EagerEngine(policy, rows=len(TEXTS)).finish(latents, [0] * len(TEXTS), conditioning, schedule)
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


@dataclass
class Adapted:
    """A guided policy whose adapters do something, and what it computed before they did."""

    policy: PipelinePolicy
    arguments: tuple
    base: Tensor

    @torch.no_grad()
    def velocity(self) -> Tensor:
        return self.policy.velocity(*self.arguments)


@pytest.fixture(scope="module")
def adapted(tiny, cpu, disturb):
    """name -> Adapted, shared by the tests that only read it."""
    made = {}

    def get(name):
        if name not in made:
            torch.manual_seed(1)
            policy = load_policy(model_config(tiny(name), name), sample_config(name, 2.0), cpu)
            arguments = noise_for(policy), torch.tensor([0.9, 0.5, 0.1]), policy.encode(TEXTS)
            with torch.no_grad():
                made[name] = Adapted(policy, arguments, policy.velocity(*arguments))
            disturb(policy.trainable(), 0.1)
        return made[name]

    return get


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_the_adapters_and_nothing_else(adapted, name):
    policy, arguments = adapted(name).policy, adapted(name).arguments
    assert all(".lora_" in parameter for parameter in policy.trainable())
    policy.velocity(*arguments).square().sum().backward()
    parameters = dict(policy.network.module.named_parameters())
    reached = {key for key, parameter in parameters.items() if parameter.grad is not None and parameter.grad.any()}
    silent = policy.trainable().keys() - reached
    assert reached <= policy.trainable().keys() and len(silent) < len(reached) / 2
    # The text stream of the last double block has no way to the image.
    last = f"transformer_blocks.{len(getattr(policy.network.module, 'transformer_blocks', [])) - 1}."
    assert all(key.startswith(last) and (".add_" in key or "add_out" in key or "_context" in key) for key in silent)
    for parameter in policy.trainable().values():
        parameter.grad = None


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_learning_repeats_the_trunk_to_the_bit(adapted, load_tiny, name, precision):
    """The call with gradient gives the numbers of the call without, so that the first ratio is exactly 1."""
    policy, arguments = adapted(name).policy, adapted(name).arguments
    if precision != "fp32":
        policy = load_tiny(name, 2.0, dtype=precision, gradient_checkpointing=True)
        arguments = *arguments[:2], policy.encode(TEXTS)
    with torch.no_grad():
        trunk = policy.velocity(*arguments)
    learnt = policy.velocity(*arguments)
    assert learnt.requires_grad and torch.equal(learnt.detach(), trunk)


@pytest.mark.parametrize("name", NAMES)
def test_reference_is_the_base_model(adapted, name):
    """Adapters off, the network is the one before training, to the bit; and they come on again."""
    case = adapted(name)
    trained = case.velocity()
    with case.policy.reference():
        assert torch.equal(case.velocity(), case.base)
    assert torch.equal(case.velocity(), trained) and difference(trained, case.base) > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_guidance_text_and_time_matter(adapted, name):
    """What equality with the pipeline could not tell if the tiny network ignored it."""
    case, policy = adapted(name), adapted(name).policy
    latents, sigma, texts = case.arguments
    changes = [(latents, sigma, texts.rows(torch.tensor([2, 1, 0]))), (latents, sigma / 2, texts)]
    with torch.no_grad():
        for change in changes:
            assert difference(case.velocity(), policy.velocity(*change)) > 1e-4
        before = case.velocity()
        policy.family.guidance += 1
        assert difference(before, case.velocity()) > 1e-3
        policy.family.guidance -= 1


@pytest.mark.parametrize("name", NAMES)
def test_adapters_travel_to_plain_diffusers_and_back(tiny, load_tiny, disturb, tmp_path, name):
    policy = load_tiny(name)
    noise = noise_for(policy)
    base = our_latents(policy, noise)
    disturb(policy.trainable(), 0.1)
    latents = our_latents(policy, noise)
    policy.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
    pipeline = plain(tiny(name))
    pipeline.load_lora_weights(tmp_path)
    expected, pictures = their_output(pipeline, name, policy, noise, NONE.get(name, 1.0))
    assert difference(latents, expected) < 2e-5 and difference(policy.decode(latents), pictures * 255) <= 1
    assert difference(latents, base) > 1e-3
    again = load_tiny(name, lora=str(tmp_path))
    assert all(torch.equal(parameter, policy.trainable()[key]) for key, parameter in again.trainable().items())


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
def test_merged_copy_computes_the_adapted_velocity(adapted, disturb, name):
    """To rounding, as of its last refresh; its storage stays, and what has no adapter is shared."""
    case, policy = adapted(name), adapted(name).policy

    def merged():
        with policy.merged():
            return case.velocity()

    first, close = merged(), 5e-6 * case.velocity().abs().max().clamp(min=1).item()
    assert difference(first, case.velocity()) < close
    with policy.merged():
        module = policy.network.active
    places = {key: parameter.data_ptr() for key, parameter in module.named_parameters()}
    disturb(policy.trainable(), 0.02)
    assert torch.equal(merged(), first) and difference(first, case.velocity()) > 1e-3
    policy.refresh_merged()
    assert difference(merged(), case.velocity()) < close
    assert places == {key: parameter.data_ptr() for key, parameter in module.named_parameters()}
    shared = {parameter.data_ptr() for parameter in policy.network.module.parameters()}
    own = {key for key, place in places.items() if place not in shared}
    assert own == {key.replace(".lora_A.default", "") for key in policy.trainable() if ".lora_A." in key}
    assert not any(".lora_" in key for key in places)


TRAINED = [*((name, "lora") for name in NAMES), ("flux", "full"), ("z_image", "full")]


@pytest.mark.parametrize(("name", "train"), TRAINED)
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


SCORER = "def brightness(images, prompts): return images.float().mean((1, 2, 3)) / 255\n"


@pytest.mark.parametrize(("name", "guidance"), [("qwen_image", 3.0), ("flux2", 3.0)])
def test_a_whole_run(tiny, tmp_path, monkeypatch, name, guidance):
    """Explore, credit, learn, evaluate and save with a model that is not the shipped one."""
    (tmp_path / "scorers.py").write_text(SCORER)
    (tmp_path / "prompts.txt").write_text("\n".join(TEXTS))
    monkeypatch.syspath_prepend(str(tmp_path))
    settings = ["digits", f"model.path={tiny(name)}", f"model.text_tokens={TEXT_TOKENS[name]}", "model.lora_rank=4",
                f"model.text_cache={tmp_path / 'texts'}", "sample.height=16", "sample.width=24", "sample.steps=4",
                f"sample.guidance={guidance}", "explore.prompts=2", "explore.noises=2", "explore.siblings=3",
                "learn.rows=2", "learn.updates=2", "objective.kl=0.01", "learn.iterations=2", "learn.lr=1e-2",
                "eval.steps=3", "eval.prompts=2", "eval.every=0", "reward.name=scorers:brightness", "reward.gold=null",
                f"prompts.train={tmp_path / 'prompts.txt'}", f"prompts.test={tmp_path / 'prompts.txt'}",
                f"run.dir={tmp_path / 'run'}", "run.trackers=[]"]  # fmt: skip
    assert main(settings) == 0
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["first_log_ratio_max"] for row in rows[1:]] == [0.0, 0.0] and rows[-1]["kl"] > 0
    assert (tmp_path / "run" / "pytorch_lora_weights.safetensors").is_file()
