"""Adapters take their inputs as they are: the same numbers as with peft's own cast to fp32, and fewer bytes kept."""

from __future__ import annotations

import pytest
import torch
from saved_bytes import saved_bytes
from tiny_pipelines import TEXTS

from tempflow.models.attention import Case
from tempflow.models.network.adapters import adapted_layers


def casting(policy, wanted: bool) -> None:
    for layer in adapted_layers(policy.network.module).values():
        layer.cast_input_dtype_enabled = wanted


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
    before = saved_bytes(policy, 1, TEXTS[0])
    with policy.reference():
        pass
    assert saved_bytes(policy, 1, TEXTS[0]) == before
    casting(policy, True)
    print(f"{name}: {before} bytes, with casts {saved_bytes(policy, 1, TEXTS[0])}")
    assert before < 0.97 * saved_bytes(policy, 1, TEXTS[0])


def test_a_continued_lora_takes_its_inputs_as_they_are(load_tiny, tmp_path):
    load_tiny("sd3").save(tmp_path)
    layers = adapted_layers(load_tiny("sd3", lora=str(tmp_path), dtype="bf16").network.module)
    assert layers and not any(layer.cast_input_dtype_enabled for layer in layers.values())
