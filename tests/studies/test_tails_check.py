"""What the check tells of a light decoder: nothing changes, little, or all."""

import diffusers
import pytest
import torch

from tempflow.run.assembly import set_up
from tempflow.settings.reading import load
from tempflow.studies.tails import check_tails, compare

SMALL = ["digits", "explore.prompts=4", "explore.noises=2", "explore.siblings=6", "explore.forks=[0]",
         "sample.steps=5", "learn.rows=2", "prompts.test=null", "run.trackers=[]"]  # fmt: skip
SIZES = {"encoder_block_out_channels": (16, 16), "decoder_block_out_channels": (16, 16), "num_encoder_blocks": (1, 1),
         "num_decoder_blocks": (1, 1), "latent_channels": 4}  # fmt: skip


def checked(tmp_path, *arguments):
    trainer, _, _ = set_up(load([*SMALL, f"run.dir={tmp_path / 'run'}", *arguments]))
    return check_tails(trainer)


@pytest.fixture(scope="module")
def decoders(tmp_path_factory):
    """Folders of a random tiny decoder, and of one that has imitated the digits' own for a few seconds."""
    folder = tmp_path_factory.mktemp("light")
    torch.manual_seed(0)
    own = diffusers.AutoencoderKL.from_pretrained("tempflow/digits/pipeline/vae").requires_grad_(False)
    light = diffusers.AutoencoderTiny(**SIZES)
    light.save_pretrained(folder / "random")
    optimizer = torch.optim.Adam(light.decoder.parameters(), 4e-3)
    trainer, _, _ = set_up(load([*SMALL, f"run.dir={folder / 'run'}", "run.seed=5"]))
    latents = sampled(trainer)
    with torch.no_grad():
        wanted = own.decode(latents / own.config.scaling_factor + own.config.shift_factor).sample
    for _ in range(150):
        rows = torch.randint(len(latents), (32,))
        loss = (light.decode(latents[rows]).sample - wanted[rows]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    light.save_pretrained(folder / "trained")
    return folder


def sampled(trainer):
    """Finished latents of another seed's first iteration."""
    from tempflow.studies import tails

    rollout, _ = tails._first_rollout(trainer)
    return tails._finished(trainer.tails[0], rollout, trainer)[0].latents


def test_the_models_own_decoder_changes_nothing(tmp_path):
    found = checked(tmp_path, "tails.decoder=tempflow:digits/pipeline/vae", "tails.stride=2")
    decoder, tails = found.causes["decoder"], found.causes["tails"]
    assert (decoder.siblings, decoder.branches, decoder.error) == (1.0, 1.0, 0.0) and decoder.groups >= 4
    assert tails == found.present and tails.siblings < 0.999
    told = found.describe()
    assert "decoder alone: rank correlation of siblings' rewards 1.0000" in told and "tails alone" in told


def test_a_random_decoder_is_found_out(tmp_path, decoders):
    found = checked(tmp_path, f"tails.decoder={decoders / 'random'}")
    assert found.causes["decoder"].siblings < 0.5 and found.present.siblings < 0.5
    assert found.causes["tails"].siblings > 0.99 and found.causes["decoder"].error > 0.05


def test_an_imitation_lies_between(tmp_path, decoders):
    found = checked(tmp_path, f"tails.decoder={decoders / 'trained'}").causes["decoder"]
    assert 0.5 < found.siblings < 1 and 0.5 < found.branches < 1


def test_without_a_light_decoder_there_is_one_line(tmp_path):
    found = checked(tmp_path)
    assert not found.causes and "\n" not in found.describe() and found.present.siblings > 0.999


def test_agreement_over_siblings_and_over_branches():
    """Prompts of different reward order branches well though siblings are in reverse; NaN is no opinion."""
    exact = torch.tensor([[[[0.0, 1, 2], [10, 11, 12]]]])
    found = compare(exact, torch.tensor([[[[2.0, 1, 0], [12, 11, 10]]]]))
    assert found.siblings == pytest.approx(-1) and found.groups == 2 and found.error == pytest.approx(4 / 3)
    assert found.branches == pytest.approx(1 - 6 * (4 * 4) / (6 * 35))
    holes = compare(exact, torch.tensor([[[[torch.nan, 1, 0], [10, 11, 12]]]]))
    assert holes.siblings == pytest.approx(1) and holes.groups == 1 and holes.branches == pytest.approx(0.9)
