"""Linear layers in 8-bit floating point: rounding, independence of rows, refresh in place, which layers take part."""

import pytest
import torch
from torch import nn

from tempflow.common.errors import BadInput
from tempflow.models.load import load_policy
from tempflow.models.network.float8 import Float8Linear, takes_float8, to_float8
from tempflow.settings.fields import ModelConfig, SampleConfig


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_rounding_is_that_of_e4m3_relative_to_each_rows_largest():
    rows = torch.randn(6, 64) * torch.logspace(-6, 6, 6).unsqueeze(1)
    values, scale = to_float8(rows)
    assert values.dtype == torch.float8_e4m3fn and scale.shape == (6, 1)
    back, largest = values.float() * scale, rows.abs().amax(1, keepdim=True)
    allowed = torch.maximum(rows.abs() / 16, largest / 448 * 2**-10 * 1.01)  # 3 bits of mantissa; subnormals below
    assert ((back - rows).abs() <= allowed).all() and back.isfinite().all()
    assert torch.allclose(back.abs().amax(1, keepdim=True), largest, rtol=1e-6)
    assert not to_float8(torch.zeros(2, 32))[0].float().any()


@pytest.mark.parametrize("bias", [True, False])
def test_the_layer_multiplies_what_it_rounded(bias):
    plain, inputs = nn.Linear(64, 32, bias=bias), torch.randn(2, 5, 64)
    layer = Float8Linear(plain.weight.detach(), plain.bias)
    (x, x_scale), (w, w_scale) = to_float8(inputs.view(10, 64)), to_float8(plain.weight.detach())
    oracle = (x.double() * x_scale) @ (w.double() * w_scale).t() + (plain.bias.double() if bias else 0)
    found = layer(inputs)
    assert found.shape == (2, 5, 32) and found.dtype == torch.bfloat16
    assert (found.double().view(10, 32) - oracle).abs().max() < 2e-2 * oracle.abs().max()
    error = (found.float() - plain(inputs)).detach()
    assert 0.005 < error.square().mean().sqrt() / plain(inputs).std() < 0.06


def test_rows_do_not_see_each_other():
    layer, inputs = Float8Linear(torch.randn(32, 64), None), torch.randn(4, 64)
    louder = inputs.clone()
    louder[3] *= 1000
    assert torch.equal(layer(inputs)[:3], layer(louder)[:3])


def test_refresh_moves_no_storage():
    layer, weight = Float8Linear(torch.randn(32, 64), None), torch.randn(32, 64)
    places = [buffer.data_ptr() for buffer in layer.buffers()]
    layer.refresh(weight)
    assert [buffer.data_ptr() for buffer in layer.buffers()] == places
    inputs = torch.randn(3, 64)
    assert torch.equal(layer(inputs), Float8Linear(weight, None)(inputs))


def test_sensitive_and_small_layers_stay():
    assert takes_float8("transformer_blocks.0.attn.to_q", nn.Linear(1024, 2048), 1024)
    assert not takes_float8("transformer_blocks.0.norm1.linear", nn.Linear(1024, 2048), 1024)
    assert not takes_float8("transformer_blocks.0.attn.to_q", nn.Linear(512, 2048), 1024)
    assert not takes_float8("transformer_blocks.0.attn.to_q", nn.Linear(1030, 2048), 1024)
    assert not takes_float8("transformer_blocks.0.attn.norm_q", nn.LayerNorm(2048), 1024)


@pytest.mark.parametrize(
    "name", ["transformer_blocks.0.img_mod.1", "layers.3.adaLN_modulation.0", "single_stream_modulation.linear"]
)
def test_layers_that_scale_whole_streams_stay(name):
    """By their names in Qwen-Image, Z-Image and FLUX.2."""
    assert not takes_float8(name, nn.Linear(1024, 6144), 1024)


@pytest.mark.parametrize("train", ["lora", "full"])
def test_a_quantised_copy_follows_the_trained_weights(cpu, disturb, train):
    policy = load_policy(ModelConfig(text_tokens=16, dtype="bf16", train=train), SampleConfig(), cpu)
    told = policy.quantise_merged(16)
    assert "linear layers of blocks in fp8" in told and "norm1.linear" in told and "to_q" not in told
    latents, sigma = torch.randn(3, 4, 8, 8), torch.full((3,), 0.6)
    conditioning = policy.encode(["a two at the top left", "three fours", "a seven above a three"])
    disturb(policy.trainable(), 0.05 if train == "lora" else 0.002)
    policy.refresh_merged()
    with torch.no_grad():
        exact = policy.velocity(latents, sigma, conditioning)
        with policy.merged():
            found = policy.velocity(latents, sigma, conditioning)
            layer = policy.network.active.transformer_blocks[0].attn.to_q
    assert isinstance(layer, Float8Linear) and layer.values.dtype == torch.float8_e4m3fn
    assert (found - exact).square().mean().sqrt() / exact.std() < 0.06


def test_fp8_asks_for_bf16(cpu):
    policy = load_policy(ModelConfig(text_tokens=16), SampleConfig(), cpu)
    with pytest.raises(BadInput, match=r"tails\.fp8.*model\.dtype=bf16"):
        policy.quantise_merged()
