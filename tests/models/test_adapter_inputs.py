"""Adapters take their inputs as they are: the same numbers as with peft's own cast to fp32, and fewer bytes kept."""

from __future__ import annotations

import pytest
import torch
from tiny_pipelines import TEXTS

from tempflow.models.attention import Case
from tempflow.models.network.adapters import adapted_layers


def casting(policy, wanted: bool) -> None:
    for layer in adapted_layers(policy.network.module).values():
        layer.cast_input_dtype_enabled = wanted


def kept_bytes(policy) -> int:
    """What a training row's forward pass keeps for its backward pass, apart from what was there before."""
    conditioning = policy.encode(TEXTS[:1])
    module = policy.network.module
    held = [*module.parameters(), *module.buffers(), *conditioning.tensors.values()]
    known, kept = {tensor.untyped_storage()._cdata for tensor in held}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy.velocity(torch.randn(1, *policy.latent_shape), torch.full((1,), 0.5), conditioning)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_numbers_and_gradients_are_those_with_casts(load_tiny, disturb, name, dtype):
    policy = load_tiny(name, 2.0, dtype=dtype)
    disturb(policy.trainable(), 0.1)
    case = Case(policy, 3)
    found, gradients = case.forward(), case.backward()
    casting(policy, True)
    assert torch.equal(case.forward(), found)
    for left, right in zip(case.backward(), gradients, strict=True):
        assert (left is None) == (right is None) and (left is None or torch.equal(left, right))


@pytest.mark.parametrize("name", ["sd3", "flux", "z_image"])
def test_a_training_row_keeps_fewer_bytes(load_tiny, name):
    """Also after a LoRA was loaded and the adapters were off for a while."""
    policy = load_tiny(name, dtype="bf16")
    before = kept_bytes(policy)
    with policy.reference():
        pass
    assert kept_bytes(policy) == before
    casting(policy, True)
    print(f"{name}: {before} bytes, with casts {kept_bytes(policy)}")
    assert before < 0.97 * kept_bytes(policy)


def test_a_continued_lora_takes_its_inputs_as_they_are(load_tiny, tmp_path):
    load_tiny("sd3").save(tmp_path)
    layers = adapted_layers(load_tiny("sd3", lora=str(tmp_path), dtype="bf16").network.module)
    assert layers and not any(layer.cast_input_dtype_enabled for layer in layers.values())
