"""LoRA files: the same change of the weights for every reader, and what can be continued."""

from __future__ import annotations

import json

import huggingface_hub
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from tiny_pipelines import BUILDERS, model_config, sample_config

from tempflow.common.errors import BadInput
from tempflow.models.load import load_skeleton
from tempflow.models.network import adapters


def deltas(policy):
    """Layer -> the change (O, I) that its adapter makes, by peft."""
    layers = adapters.adapted_layers(policy.network.module)
    return {name: layer.get_delta_weight("default").detach() for name, layer in layers.items()}


def read_deltas(file, scale_of):
    """The same of a LoRA file; `scale_of(tensors, metadata, layer)` is a reader's rule."""
    with safe_open(file, "pt") as opened:
        tensors = {name.removeprefix("transformer."): opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        metadata = json.loads(opened.metadata()["lora_adapter_metadata"])
    layers = {name.partition(".lora_A")[0] for name in tensors if ".lora_A." in name}
    products = {n: tensors[f"{n}.lora_B.weight"] @ tensors[f"{n}.lora_A.weight"] for n in layers}
    return {name: product * scale_of(tensors, metadata, name) for name, product in products.items()}


def by_metadata(tensors, metadata, layer):
    """diffusers and peft."""
    return metadata["transformer.lora_alpha"] / metadata["transformer.r"]


def by_alpha_tensors(tensors, metadata, layer):
    """ComfyUI, and others that read kohya's files."""
    alpha = tensors.get(f"{layer}.alpha")
    return 1.0 if alpha is None else alpha.item() / len(tensors[f"{layer}.lora_A.weight"])


def assert_same(found, expected, rtol=1e-6):
    assert found.keys() == expected.keys() and all(delta.abs().max() > 1e-3 for delta in expected.values())
    for name, delta in expected.items():
        torch.testing.assert_close(found[name], delta, rtol=rtol, atol=1e-7)


@pytest.mark.parametrize("name", BUILDERS)
def test_a_lora_file_means_the_same_to_all_that_read_it(tiny, load_tiny, disturb, tmp_path, name):
    """Trained at alpha 6 and rank 4, scale 1.5; continued at any alpha."""
    policy = load_tiny(name, lora_alpha=6)
    disturb(policy.trainable(), 0.1)
    expected = deltas(policy)
    policy.save(tmp_path)
    for rule in (by_metadata, by_alpha_tensors):
        assert_same(read_deltas(tmp_path / "pytorch_lora_weights.safetensors", rule), expected)
    pipeline = DiffusionPipeline.from_pretrained(tiny(name))
    pipeline.load_lora_weights(tmp_path)
    theirs = adapters.adapted_layers(pipeline.transformer)
    assert_same({n: layer.get_delta_weight("default_0").detach() for n, layer in theirs.items()}, expected)
    for alpha in (6, 4, 64):
        assert_same(deltas(load_tiny(name, lora=str(tmp_path), lora_alpha=alpha)), expected)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_loras_with_their_scale_outside_are_continued(load_tiny, disturb, tmp_path, name):
    """Those saved before, whose alpha stands in the metadata; those that tell none, whose scale is 1 as in plain
    diffusers; and those with `.alpha` tensors.
    """
    policy = load_tiny(name)
    disturb(policy.trainable(), 0.1)
    weights, metadata = adapters.adapter_state(policy.network.module)
    save = policy.family.pipeline_class.save_lora_weights
    save(tmp_path / "before", weights, transformer_lora_adapter_metadata=metadata)
    again = load_tiny(name, lora=str(tmp_path / "before"))
    assert all(torch.equal(parameter, policy.trainable()[key]) for key, parameter in again.trainable().items())
    save(tmp_path / "silent", weights)
    half = {layer: delta / 2 for layer, delta in deltas(policy).items()}
    assert_same(deltas(load_tiny(name, lora=str(tmp_path / "silent"))), half)
    tensors = {f"{layer}.alpha": torch.tensor(8.0) for layer in half}
    save(tmp_path / "tensors", weights | tensors)
    assert_same(deltas(load_tiny(name, lora=str(tmp_path / "tensors"))), deltas(policy))


@pytest.mark.parametrize("kind", [{"use_rslora": True}, {"use_dora": True}, {"alpha_pattern": {"attn.to_q": 5}}])
def test_loras_of_another_kind_are_refused(tiny, load_tiny, tmp_path, kind):
    """Their scale is another than lora_alpha / lora_rank."""
    policy = load_tiny("flux")
    weights, metadata = adapters.adapter_state(policy.network.module)
    metadata = {**metadata, **kind}
    policy.family.pipeline_class.save_lora_weights(tmp_path, weights, transformer_lora_adapter_metadata=metadata)
    with pytest.raises(BadInput, match=f"model.lora=.*{next(iter(kind))}"):
        load_skeleton(model_config(tiny("flux"), "flux", lora=str(tmp_path)), sample_config("flux"))


def test_a_lora_of_a_hub_that_does_not_answer_is_one_line(tiny, monkeypatch):
    """Whatever the error is that the hub's client has for it."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(BadInput, match="model.lora=nowhere/none: the LoRA does not load"):
        load_skeleton(model_config(tiny("flux"), "flux", lora="nowhere/none"), sample_config("flux"))
