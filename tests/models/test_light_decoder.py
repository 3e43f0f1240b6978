"""Light decoders: what diffusers makes of the same latents, what does not fit, and who sees their images."""

import json

import diffusers
import pytest
import tiny_pipelines
import torch
from safetensors.torch import save_file
from tiny_pipelines import TEXT_TOKENS, TEXTS

from tempflow.common.errors import BadInput
from tempflow.common.files import resolve
from tempflow.explore.rollout import FinishedBranches
from tempflow.explore.schedule import build_schedule
from tempflow.explore.tails.engine import EagerEngine
from tempflow.forecast.memory import plan_memory
from tempflow.forecast.words import Forecast
from tempflow.method import read_method
from tempflow.models.decoding import FamilyDecoder
from tempflow.models.load import load_skeleton
from tempflow.parallel.ranks import Ranks
from tempflow.prompts import Prompt
from tempflow.rewards.panel import Panel
from tempflow.rewards.scorer import Scorer
from tempflow.run.assembly import set_up, show_plan
from tempflow.settings.fields import ModelConfig, SampleConfig
from tempflow.settings.reading import load

FITTING = ["sd3", "flux", "z_image"]
STEPS = 2


def noise_for(policy):
    return torch.randn(len(TEXTS), *policy.latent_shape)


def our_latents(policy, noise):
    schedule = build_schedule(policy.sigmas(STEPS), "flow_sde", 0.7)
    latents = noise.clone()
    EagerEngine(policy, rows=len(TEXTS)).finish(latents, [0] * len(TEXTS), policy.encode(TEXTS), schedule)
    return latents


def their_images(pipeline, name, policy, noise):
    """Images (0 .. 1) of a plain pipeline's own call."""
    pipeline.set_progress_bar_config(disable=True)
    _, height, width = policy.image_shape
    return pipeline(prompt=list(TEXTS), latents=noise.clone(), num_inference_steps=STEPS, height=height, width=width,
                    max_sequence_length=TEXT_TOKENS[name], output_type="pt",
                    guidance_scale=tiny_pipelines.NONE.get(name, 1.0)).images  # fmt: skip


def tiny_decoder(channels=4, blocks=2, width=8, **options):
    """A random `AutoencoderTiny` to half the side, whose images are not all black."""
    sizes = {"encoder_block_out_channels": (width,) * blocks, "decoder_block_out_channels": (width,) * blocks,
             "num_encoder_blocks": (1,) * blocks, "num_decoder_blocks": (1,) * blocks}  # fmt: skip
    vae = diffusers.AutoencoderTiny(latent_channels=channels, **sizes, **options)
    with torch.no_grad():
        last = vae.decoder.layers[-1]
        last.weight.mul_(4)
        last.bias.fill_(0.5)
    return vae


@pytest.fixture
def light(tmp_path):
    """Saves an autoencoder: a tiny one with these options, or the one given."""

    def save(vae=None, **options):
        (vae or tiny_decoder(**options)).save_pretrained(tmp_path / "light")
        return str(tmp_path / "light")

    return save


@pytest.mark.parametrize("name", FITTING)
def test_images_are_those_of_a_pipeline_with_that_autoencoder(tiny, load_tiny, light, name):
    path, policy = light(), load_tiny(name)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tiny(name))
    pipeline.vae = diffusers.AutoencoderTiny.from_pretrained(path)
    noise = noise_for(policy)
    expected = their_images(pipeline, name, policy, noise)
    found = policy.light_decoder(path, False).decode(our_latents(policy, noise))
    assert found.dtype == torch.uint8 and found.shape == (3, *policy.image_shape)
    assert (found.float() - expected * 255).abs().max() <= 1 and found.float().std() > 5


@pytest.mark.parametrize("name", FITTING)
def test_the_models_own_autoencoder_gives_its_own_images(load_tiny, light, name):
    policy = load_tiny(name, vae_dtype="bf16")
    decoder = policy.light_decoder(light(policy.pipeline.vae), False)
    latents = noise_for(policy)
    assert torch.equal(decoder.decode(latents), policy.decode(latents))


def test_it_is_frozen_and_sliced_in_the_own_decoders_precision(load_tiny, light):
    policy, latents = load_tiny("sd3", vae_dtype="bf16", vae_slicing=True), torch.randn(3, 4, 8, 12)
    decoder = policy.light_decoder(light(), False)
    assert {parameter.dtype for parameter in decoder.vae.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in decoder.vae.parameters())
    assert decoder.vae.use_slicing and not decoder.vae.use_tiling
    assert not decoder.decode(latents).requires_grad


def test_convolutions_have_channels_last_on_a_gpu_alone(load_tiny):
    """Not where they are of videos."""
    policy, device = load_tiny("sd3"), torch.device("cuda")
    for vae, last in ((tiny_decoder(), True), (policy.pipeline.vae, True), (tiny_pipelines.qwen_image().vae, False)):
        for where, expected in ((torch.device("cpu"), False), (device, last)):
            FamilyDecoder(policy.family, vae, where).prepare(False)
            weight = next(p for p in vae.decoder.parameters() if p.dim() >= 4 and p.shape[1] > 1 and p.shape[-1] > 1)
            found = weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last)
            assert found == expected


def own(**changes):
    """An autoencoder of the tiny pipelines' own kind."""
    options = {"scaling_factor": 0.6, "shift_factor": 0.1, "use_quant_conv": False, "use_post_quant_conv": False}
    return tiny_pipelines.autoencoder(**options | changes)


@pytest.mark.parametrize(
    ("name", "vae", "words"),
    [
        ("sd3", lambda: tiny_decoder(channels=16), "16 channels, but this model's have 4"),
        ("flux", lambda: tiny_decoder(blocks=3), r"makes images \(3, 32, 48\), but this model's are \(3, 16, 24\)"),
        ("sd3", lambda: own(scaling_factor=0.3), r"scale and shift \(0.3, 0.1\), neither"),
        ("z_image", lambda: tiny_decoder(shift_factor=0.2), r"scale and shift \(1.0, 0.2\), neither"),
        ("qwen_image", tiny_decoder, "those of videos"),
        ("flux2", lambda: tiny_decoder(channels=16), "16 channels, but this model's have 4"),
        ("flux2", tiny_pipelines.flux2_autoencoder, "holds a AutoencoderKLFlux2; supported are AutoencoderTiny"),
    ],
)
def test_what_does_not_fit_is_refused_before_weights_are_loaded(tiny, light, name, vae, words):
    path = light(vae())
    (resolve(path) / "diffusion_pytorch_model.safetensors").unlink()
    skeleton = load_skeleton(tiny_pipelines.model_config(tiny(name), name), tiny_pipelines.sample_config(name))
    with pytest.raises(BadInput, match=f"tails.decoder=.*{words}") as caught:
        skeleton.light(path)
    assert "\n" not in str(caught.value)


def test_only_whole_safetensors_are_loaded(load_tiny, light, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    policy, path = load_tiny("sd3"), light()
    file = resolve(path) / "diffusion_pytorch_model.safetensors"

    def refused(where, words):
        with pytest.raises(BadInput, match=f"tails.decoder=.*{words}") as caught:
            policy.light_decoder(where, False)
        assert "\n" not in str(caught.value)

    half = {name: value for name, value in tiny_decoder().state_dict().items() if "decoder" not in name}
    diffusers.utils.logging.set_verbosity_error()
    save_file(half, file)
    refused(path, "lacks the tensor")
    file.write_bytes(b"torn")
    refused(path, "not readable")
    file.unlink()
    torch.save(tiny_decoder().state_dict(), file.with_suffix(".bin"))
    refused(path, "does not load")
    (resolve(path) / "config.json").write_text("[")
    refused(path, "does not load")
    (resolve(path) / "config.json").write_text(json.dumps({"_class_name": "AutoencoderTiny", "latent_channels": "x"}))
    refused(path, "does not load")
    refused("/nowhere/at/all", "no such folder")
    refused("nobody/nothing", "does not load")


class Looking:
    """A scorer that keeps what it is shown."""

    def __init__(self):
        self.images = []

    def __call__(self, images, prompts):
        self.images.append(images)
        return images[:, 0].float().mean((1, 2))


def test_only_rewards_of_branches_see_its_images(tmp_path, light):
    """Evaluation, gold and pictures are the model's own decoder's."""
    looks = Looking(), Looking()
    panels = [Panel({"look": Scorer("reward.name", "look", look, 100)}, torch.ones(1)) for look in looks]
    config = load(["digits", "explore.prompts=2", "explore.noises=2", "learn.rows=2", "run.trackers=[]",
                   f"run.dir={tmp_path / 'run'}", "eval.prompts=3", f"tails.decoder={light()}"])  # fmt: skip
    trainer, journal, _ = set_up(config, panels=tuple(panels))
    latents = torch.randn(5, *trainer.policy.latent_shape)
    trainer.scores.submit(FinishedBranches(latents, [0] * 5, torch.arange(5)), [Prompt("a one")])
    trainer.scores.collect()
    expected = trainer.policy.light_decoder(config.tails.decoder, False).decode(latents)
    assert torch.equal(looks[0].images.pop(), expected)
    decoded, plain_decode = [], trainer.policy.decoder.decode
    trainer.policy.decoder.decode = lambda latents: decoded.append(plain_decode(latents)) or decoded[-1]
    result = journal.evaluator.evaluate()
    for look in looks:
        assert torch.equal(torch.cat(look.images), torch.cat(decoded))
    assert torch.equal(result.pictures, decoded[0])


def test_the_plan_names_and_counts_it(capsys, light, tmp_path):
    vae = tiny_decoder()
    config = load(["digits", f"tails.decoder={light(vae)}", f"run.dir={tmp_path / 'run'}"])
    show_plan(config, Ranks(0, 1, torch.device("cpu")))
    count = sum(parameter.numel() for parameter in vae.parameters())
    assert f"light decoder {config.tails.decoder}, {count:,} parameters" in " ".join(capsys.readouterr().err.split())
    skeleton = load_skeleton(ModelConfig(text_tokens=16), SampleConfig())
    method, schedule = read_method(config, skeleton.sigmas(config.sample.steps))
    plan = plan_memory(config, skeleton, Forecast(config, skeleton, method, schedule, 1).cost())
    assert plan.stays["light decoder"] == 2 * count, "bf16 on a GPU"
    assert skeleton.light(None).bytes == 0
