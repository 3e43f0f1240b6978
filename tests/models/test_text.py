"""Encoded texts: once each, the same row in any company, kept in memory and on disk; padding changes nothing."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pipelines import BUILDERS, TEXT_TOKENS, TEXTS, model_config, sample_config

from tempflow.common.errors import BadInput
from tempflow.models import text as text_module
from tempflow.models.load import load_policy
from tempflow.settings.fields import ModelConfig, SampleConfig


def count_calls(policy):
    """The list of texts that the policy's encoders will have seen."""
    seen, encode = [], policy.texts.encode

    def counted(text):
        seen.append(text)
        return encode(text)

    policy.texts.encode = counted
    return seen


def equal_rows(left, right):
    assert left.keys() == right.keys()
    return all(torch.equal(left[name], right[name]) and left[name].dtype == right[name].dtype for name in left)


@pytest.mark.parametrize("name", list(BUILDERS))
def test_a_row_is_the_same_in_any_company_and_encoded_once(load_tiny, name):
    policy = load_tiny(name, 2.0)
    seen = count_calls(policy)
    together = policy.encode([TEXTS[2], TEXTS[0], TEXTS[2], TEXTS[1]])
    assert seen == [TEXTS[2], TEXTS[0], TEXTS[1]]
    alone = load_tiny(name, 2.0).encode([TEXTS[0]])
    assert equal_rows(alone.tensors, together.rows(slice(1, 2)).tensors)
    assert equal_rows(policy.encode([TEXTS[0]]).tensors, alone.tensors) and len(seen) == 3


@pytest.mark.parametrize("name", ["qwen_image", "z_image"])
def test_padding_changes_no_velocity(load_tiny, name):
    """Longer padded rows give the same velocity, to rounding, so that one length can serve all texts of a run."""
    latents, sigma, velocities = None, torch.tensor([0.9, 0.5, 0.1]), []
    for tokens in (TEXT_TOKENS[name], TEXT_TOKENS[name] + 50):
        policy = load_tiny(name, 2.0, text_tokens=tokens)
        conditioning = policy.encode(TEXTS)
        assert {row.shape[1] >= tokens for row in conditioning.tensors.values()} == {True}
        latents = torch.linspace(-1, 1, 3 * policy.latent_shape[0] * torch.Size(policy.latent_shape[1:]).numel())
        with torch.no_grad():
            velocities.append(policy.velocity(latents.view(3, *policy.latent_shape), sigma, conditioning))
    assert (velocities[0] - velocities[1]).abs().max() < 2e-6


def test_rows_are_kept_on_disk(load_tiny, tmp_path, capsys):
    folder = tmp_path / "texts"
    fresh = load_tiny("z_image", text_cache=str(folder)).encode(TEXTS)
    assert len(list(folder.iterdir())) == 3 and not list(folder.glob("*.partial"))
    policy = load_tiny("z_image", text_cache=str(folder))
    seen = count_calls(policy)
    assert equal_rows(policy.encode(TEXTS).tensors, fresh.tensors) and not seen
    other = load_tiny("z_image", text_cache=str(folder), text_tokens=64)
    seen = count_calls(other)
    other.encode(TEXTS[:1])
    assert seen == TEXTS[:1] and len(list(folder.iterdir())) == 4 and not capsys.readouterr().err.count("anew")


def test_long_texts_with_the_same_beginning_have_their_own_rows(load_tiny, tmp_path):
    """On disk and in memory; they begin alike for more than 64 characters."""
    long = [TEXTS[2], TEXTS[2].replace("old sailor", "young one")]
    assert long[0][:66] == long[1][:66]
    policy = load_tiny("z_image", text_cache=str(tmp_path), text_tokens=128)
    expected = [policy.encode([text]).tensors for text in long]
    assert not equal_rows(*expected) and len(list(tmp_path.iterdir())) == 2
    for reader in (policy, load_tiny("z_image", text_cache=str(tmp_path), text_tokens=128)):
        for text, row in zip(long, expected, strict=True):
            assert equal_rows(reader.encode([text]).tensors, row)


def test_another_encoder_in_the_same_place_encodes_anew(tiny, cpu, tmp_path):
    """Of the same name and size, as after a download of another revision."""
    folder = shutil.copytree(tiny("z_image"), tmp_path / "model")
    settings = model_config(folder, "z_image", text_cache=str(tmp_path / "texts"))
    before = load_policy(settings, sample_config("z_image"), cpu).encode(TEXTS[:1]).tensors
    (file,) = (folder / "text_encoder").glob("*.safetensors")
    size, tensors = file.stat().st_size, load_file(file)
    save_file({name: tensor.flip(0).contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})
    assert file.stat().st_size == size
    after = load_policy(settings, sample_config("z_image"), cpu).encode(TEXTS[:1]).tensors
    assert not equal_rows(before, after) and len(list((tmp_path / "texts").iterdir())) == 2


def test_a_broken_file_is_encoded_anew_with_a_word(load_tiny, tmp_path, capsys):
    fresh = load_tiny("flux", text_cache=str(tmp_path)).encode(TEXTS[:1])
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    again = load_tiny("flux", text_cache=str(tmp_path)).encode(TEXTS[:1])
    assert equal_rows(again.tensors, fresh.tensors) and file.read_bytes() == whole
    assert f"{file} does not load" in capsys.readouterr().err


def test_an_unusable_cache_folder_is_refused(load_tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"model.text_cache=.*cannot be written"):
        load_tiny("flux", text_cache=str(tmp_path / "file"))


def test_memory_is_bounded(load_tiny, monkeypatch):
    """The texts used longest ago are dropped, and encoded again when they are asked for."""
    policy = load_tiny("flux")
    seen = count_calls(policy)
    expected = policy.encode(TEXTS)
    monkeypatch.setattr(text_module, "MEMORY_LIMIT", policy.texts.bytes - 1)
    policy.encode([TEXTS[0], "another"])
    assert policy.texts.bytes <= text_module.MEMORY_LIMIT and list(policy.texts.memory)[-1] == "another"
    assert equal_rows(policy.encode(TEXTS).tensors, expected.tensors)
    assert seen[:3] == TEXTS and seen[3] == "another" and set(seen[4:]) <= {TEXTS[1], TEXTS[2]} and len(seen) > 4


def test_encoders_are_on_the_device_only_while_they_work(load_tiny):
    policy = load_tiny("sd3", offload_text=True)
    moves = []
    for encoder in policy.texts.encoders:
        encoder.to = lambda device: moves.append(str(device))
    policy.texts.device = torch.device("meta")  # stands for a GPU: nothing can be read from there
    policy.texts.encode = lambda text: moves.append(text) or {"embeds": torch.ones(1, 2)}
    policy.encode(["one", "two"])
    policy.encode(["one"])
    assert moves == ["meta"] * 3 + ["one", "two"] + ["cpu"] * 3


def cached_policy(folder):
    """The shipped pipeline, with a text cache."""
    config = ModelConfig(text_tokens=16, text_cache=str(folder))
    return load_policy(config, SampleConfig(), torch.device("cpu"))


def test_a_cached_text_of_no_numbers_is_encoded_again(tmp_path, capfd):
    policy = cached_policy(tmp_path)
    expected = policy.encode(["two red fives"]).tensors
    for file in tmp_path.iterdir():
        row = load_file(file)
        save_file({name: tensor.fill_(float("nan")) for name, tensor in row.items()}, file)
    found = cached_policy(tmp_path).encode(["two red fives"]).tensors
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert "holds NaN or infinity" in capfd.readouterr().err


def test_a_cache_that_can_no_longer_be_written_ends_nothing(tmp_path, capfd):
    """As on a full disk, or where the folder was removed."""
    expected = cached_policy(tmp_path / "kept").encode(["one", "two"]).tensors
    policy = cached_policy(tmp_path / "texts")
    shutil.rmtree(tmp_path / "texts")
    found = policy.encode(["one", "two"]).tensors
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert capfd.readouterr().err.count("model.text_cache=") == 1


def test_a_cached_text_of_another_shape_is_refused(tmp_path):
    policy = cached_policy(tmp_path)
    policy.encode(["one"])
    (file,) = (file for file in tmp_path.iterdir())
    save_file({name: tensor[:, :1].clone() for name, tensor in load_file(file).items()}, file)
    again = cached_policy(tmp_path)
    with pytest.raises(BadInput, match=r"model\.text_cache=.*shapes"):
        again.encode(["two", "one"])
