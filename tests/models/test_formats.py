"""LoRA files of other programs, read by diffusers' own readers and by the programs' published rules."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    ZImageTransformer2DModel,
)
from diffusers.loaders import lora_conversion_utils as lora_readers
from diffusers.loaders import single_file_utils as file_readers
from tiny_pipelines import BUILDERS
from torch import nn

from tempflow.common.errors import BadInput
from tempflow.models.formats.layouts import FLUX, FLUX2, SD3, Change
from tempflow.models.formats.loras import FORMATS, change_of, lora_format, lora_tensors, write_lora
from tempflow.models.network.adapters import adapted_layers

INPUTS = 3
"""columns of changes whose rows alone matter"""


def full(change):
    """The change of a weight, in float64."""
    return change.up.double() @ change.down.double()


def changes_of_policy(policy):
    config = policy.network.config
    return change_of(policy.trainable(), config.lora_alpha / config.lora_rank)


def as_read(tensors, names, prefix, dot):
    """What ComfyUI's and sd-scripts' readers make of a file: weight -> its change, in float64.

    Both look for each weight of their own model by `prefix` and its name, for a tensor `alpha` and two matrices, and
    add up @ down * alpha / rank; alpha = rank where there is none.
    """
    deltas, used = {}, set()
    for name in names:
        base = prefix + name.replace(".", dot)
        for up, down in (("lora_up", "lora_down"), ("lora_B", "lora_A")):
            keys = [f"{base}.{half}.weight" for half in (up, down)]
            if keys[0] in tensors:
                high, low = (tensors[key].double() for key in keys)
                alpha = tensors.get(f"{base}.alpha")
                deltas[name] = high @ low * (1.0 if alpha is None else alpha.item() / len(low))
                used |= {*keys, f"{base}.alpha"}
    assert tensors.keys() <= used, "the reader would pass over a tensor"
    return deltas


READERS = {"comfyui": ("diffusion_model.", "."), "kohya": ("lora_unet_", "_")}

# The authors' layouts, against diffusers' readers of the authors' own files


class Rest(dict):
    """A checkpoint in which whatever else a reader asks for is zero."""

    def pop(self, key, *default):
        return super().pop(key) if key in self else torch.zeros(21504)


def on_meta(kind, **options):
    with torch.device("meta"):
        return kind(**options)


AUTHORS = {
    "sd3": (
        SD3, file_readers.convert_sd3_transformer_checkpoint_to_diffusers,
        lambda: on_meta(SD3Transformer2DModel, num_layers=2, num_attention_heads=2, dual_attention_layers=(0,),
                        caption_projection_dim=128, qk_norm="rms_norm"),
    ),
    "flux": (
        FLUX, file_readers.convert_flux_transformer_checkpoint_to_diffusers,
        lambda: on_meta(FluxTransformer2DModel, num_layers=1, num_single_layers=1, guidance_embeds=True),
    ),
    "flux2": (
        FLUX2, file_readers.convert_flux2_transformer_checkpoint_to_diffusers,
        lambda: on_meta(Flux2Transformer2DModel, num_layers=1, num_single_layers=2, num_attention_heads=2,
                        timestep_guidance_channels=16),
    ),
}  # fmt: skip
"""layout, diffusers' reader of a checkpoint of it, and a transformer (FLUX.1's reader knows one width)"""


def random_changes(module, rank=2):
    """Of every linear layer, which take few inputs, so that FLUX.1's width does not matter."""
    rows = {name: len(part.weight) for name, part in module.named_modules() if isinstance(part, nn.Linear)}
    return {name: Change(torch.randn(rank, INPUTS), torch.randn(count, rank)) for name, count in rows.items()}


@pytest.mark.parametrize("family", AUTHORS)
@pytest.mark.parametrize("to", READERS)
def test_every_layer_lies_where_diffusers_reads_it_from_the_authors_file(family, to):
    """The reader's weights, changed by its rule, become the changes that diffusers' layers have."""
    layout, reader, build = AUTHORS[family]
    module = build()
    changes = random_changes(module)
    rule = FORMATS[to]["FluxPipeline" if family == "flux" else "StableDiffusion3Pipeline"]
    rule = type(rule)(layout, rule.naming)
    blocks = [name.format(number) for name in layout.stacked for number in (range(2) if "{}" in name else [""])]
    deltas = as_read(lora_tensors(changes, module, rule, torch.float32), blocks, *READERS[to])
    checkpoint = {f"{name}.weight": delta for name, delta in deltas.items()}
    found = reader(Rest(checkpoint) if family != "flux2" else checkpoint)
    for name, change in changes.items():
        torch.testing.assert_close(found[f"{name}.weight"].double(), full(change), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("left_out", [("attn.to_k",), ("attn.to_q", "proj_mlp"), ("attn.to_k", "attn.to_v")])
def test_parts_of_a_stacked_layer_that_were_not_trained_stay_zero(left_out):
    """Through diffusers' reader of kohya's FLUX.1 files, whether it sees the ranks beside each other or not."""
    module = AUTHORS["flux"][2]()
    layers = {"attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"} - set(left_out)
    names = {f"single_transformer_blocks.0.{layer}" for layer in layers}
    changes = {name: change for name, change in random_changes(module, rank=4).items() if name in names}
    tensors = lora_tensors(changes, module, FORMATS["kohya"]["FluxPipeline"], torch.float32)
    found = read_by_diffusers(lora_readers._convert_kohya_flux_lora_to_diffusers(tensors))
    for name, delta in found.items():
        expected = full(changes[name]) if name in changes else torch.zeros_like(delta)
        torch.testing.assert_close(delta, expected, rtol=1e-12, atol=1e-12)
    assert names <= found.keys()


def read_by_diffusers(state):
    """Layer -> the change (float64) of a state dict that diffusers has made; it has no alphas any more."""
    layers = {key.removesuffix(".lora_A.weight") for key in state if key.endswith(".lora_A.weight")}
    return {name.removeprefix("transformer."): state[f"{name}.lora_B.weight"].double()
            @ state[f"{name}.lora_A.weight"].double() for name in layers}  # fmt: skip


# Whole files of all families, through the loaders that users call

LOADED = [(to, name) for to in READERS for name in BUILDERS if name != "sd3"]
"""diffusers has no reader of these files for SD3"""


@pytest.mark.parametrize(("to", "name"), LOADED)
def test_diffusers_loads_the_file_as_the_same_change_at_any_strength(tiny, load_tiny, disturb, tmp_path, to, name):
    """FLUX.1's reader knows one width of single blocks, so of the small model's only double blocks are trained."""
    layers = [f"transformer_blocks.{n}.attn.{layer}" for n in range(2) for layer in ("to_q", "to_v", "add_k_proj")]
    policy = load_tiny(name, lora_alpha=6, **({"lora_targets": layers} if name == "flux" else {}))
    disturb(policy.trainable(), 0.1)
    kind = type(policy.pipeline)
    tensors = lora_tensors(changes_of_policy(policy), policy.network.module, lora_format(to, kind), torch.float32)
    write_lora(tmp_path / "lora.safetensors", tensors, {})
    pipeline = DiffusionPipeline.from_pretrained(tiny(name))
    pipeline.load_lora_weights(tmp_path / "lora.safetensors", adapter_name="trained")
    own = adapted_layers(policy.network.module)
    for strength in (1.0, 0.5):
        pipeline.set_adapters("trained", strength)
        theirs = adapted_layers(pipeline.transformer)
        deltas = {layer: part.get_delta_weight("trained") for layer, part in theirs.items()}
        assert not any(deltas.pop(layer).any() for layer in deltas.keys() - own.keys()), "parts that were not trained"
        for layer, part in own.items():
            expected = part.get_delta_weight("default") * strength
            assert expected.abs().max() > 1e-3
            torch.testing.assert_close(deltas[layer], expected, rtol=1e-5, atol=1e-7)


def z_image_layers(module):
    """ComfyUI's rule for Z-Image: a part of diffusers' name stands for rows of the layer that it keeps as one."""
    places = {}
    for name, part in module.named_modules():
        if name.endswith("attention.to_q"):
            rows, block = len(part.weight), name.removesuffix("to_q")
            places |= {f"{block}to_{half}": (f"{block}qkv", slot * rows) for slot, half in enumerate("qkv")}
            places[f"{block}to_out.0"] = (f"{block}out", 0)
    return places


def test_comfyui_puts_z_images_parts_into_the_authors_layer(disturb):
    """And diffusers' reader of the authors' file takes them out again."""
    module = on_meta(ZImageTransformer2DModel, dim=64, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
                     cap_feat_dim=16, axes_dims=[8, 12, 12], axes_lens=[64, 32, 32])  # fmt: skip
    places = z_image_layers(module)
    changes = {name: change for name, change in random_changes(module).items() if name in places}
    tensors = lora_tensors(changes, module, FORMATS["comfyui"]["ZImagePipeline"], torch.float32)
    checkpoint = {}
    for name, delta in as_read(tensors, list(places), *READERS["comfyui"]).items():
        whole, start = places[name]
        height = 192 if whole.endswith("qkv") else 64
        target = checkpoint.setdefault(f"{whole}.weight", torch.zeros(height, INPUTS).double())
        target[start : start + len(delta)] += delta
    found = file_readers.convert_z_image_transformer_checkpoint_to_diffusers(checkpoint)
    assert len(changes) == 4 * 4
    for name, change in changes.items():
        torch.testing.assert_close(found[f"{name}.weight"], full(change), rtol=1e-12, atol=1e-12)


def test_alpha_is_the_rank_in_any_precision():
    """261 is no number of bf16."""
    module = AUTHORS["flux"][2]()
    names = [f"transformer_blocks.0.attn.to_{half}" for half in "qkv"]
    changes = {name: change for name, change in random_changes(module, rank=87).items() if name in names}
    tensors = lora_tensors(changes, module, FORMATS["kohya"]["FluxPipeline"], torch.bfloat16)
    qkv = "lora_unet_double_blocks_0_img_attn_qkv"
    assert tensors[f"{qkv}.alpha"].item() == len(tensors[f"{qkv}.lora_down.weight"]) == 3 * 87
    assert tensors[f"{qkv}.lora_up.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize(("to", "kind", "layer"), [
    ("kohya", "Flux2Pipeline", "double_stream_modulation_img.linear"), ("kohya", "QwenImagePipeline", "img_in"),
    ("comfyui", "ZImagePipeline", "cap_embedder.1"), ("kohya", "FluxPipeline", "proj_out"),
    ("kohya", "FluxPipeline", "norm_out.linear"),
])  # fmt: skip
def test_layers_that_a_reader_does_not_look_for_are_refused(to, kind, layer):
    changes = {layer: Change(torch.ones(1, 2), torch.ones(6, 1))}
    with pytest.raises(BadInput, match=f"model.lora_targets={layer}.*--to diffusers"):
        lora_tensors(changes, nn.Module(), FORMATS[to][kind], torch.float32)


def test_of_flux_sd_scripts_looks_for_all_layers_but_the_last_two():
    module = AUTHORS["flux"][2]()
    changes = random_changes(module)
    read = {name: change for name, change in changes.items() if name not in ("proj_out", "norm_out.linear")}
    tensors = lora_tensors(read, module, FORMATS["kohya"]["FluxPipeline"], torch.float32)
    assert len(read) == len(changes) - 2 and not any("final_layer" in name for name in tensors)


def test_families_without_a_rule_are_told_of_the_formats_that_work():
    class NewPipeline(DiffusionPipeline):
        pass

    with pytest.raises(BadInput, match=r"--to=kohya.*NewPipeline.*diffusers, merged, hub"):
        lora_format("kohya", NewPipeline)
