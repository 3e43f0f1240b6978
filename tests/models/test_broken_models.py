"""Model folders that someone damaged or planted something in: one line that names the file, before anything is lost."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from long import mostly_long
from safetensors.torch import load_file, save_file

from tempflow.common.errors import BadInput
from tempflow.common.files import PACKAGE
from tempflow.models.load import load_policy, load_skeleton
from tempflow.models.weights.files import check_files
from tempflow.models.weights.origin import Origin
from tempflow.models.weights.parts import nonfinite
from tempflow.settings.fields import ModelConfig, SampleConfig

WEIGHTS = {
    "transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model",
    "text_encoder": "model", "text_encoder_3": "model",
}  # fmt: skip
NAMES = {
    "transformer": "transformer_blocks.1.attn.to_q.weight", "vae": "decoder.conv_in.weight",
    "text_encoder": "text_projection.weight", "text_encoder_3": "encoder.final_layer_norm.weight",
}  # fmt: skip
"""A tensor of each part."""
NAN, INFINITY = float("nan"), float("inf")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the shipped pipeline, to be damaged."""
    return shutil.copytree(PACKAGE / "digits" / "pipeline", tmp_path / "model")


def load(folder: Path, **model):
    return load_policy(ModelConfig(path=str(folder), text_tokens=16, **model), SampleConfig(), torch.device("cpu"))


def refused(folder: Path, *words: str, **model) -> None:
    """One line of model.path with all of these words."""
    with pytest.raises(BadInput) as caught:
        load(folder, **model)
    assert caught.value.field == "model.path" and "\n" not in str(caught.value)
    assert all(word in caught.value.hint for word in words), caught.value


def edit_weights(folder: Path, part: str, edit) -> None:
    file = folder / part / f"{WEIGHTS[part]}.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def edit_json(file: Path, **entries) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


@pytest.mark.parametrize(("part", "value"), zip(WEIGHTS, (NAN, -INFINITY, INFINITY, NAN), strict=True))
def test_a_weight_that_is_no_number(folder, part, value):
    edit_weights(folder, part, lambda tensors: tensors[NAMES[part]].view(-1)[-1:].fill_(value))
    refused(folder, f"{part}/{WEIGHTS[part]}.safetensors", NAMES[part], "NaN or infinity")


def test_a_weight_that_the_precision_cannot_hold(folder):
    edit_weights(folder, "vae", lambda tensors: tensors[NAMES["vae"]].view(-1)[:1].fill_(1e6))
    load(folder)
    refused(folder, NAMES["vae"], "float16", vae_dtype="fp16")


@pytest.mark.parametrize("part", mostly_long(["transformer", "text_encoder"], 2))
@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda tensors, name: tensors.pop(name), "lacks the tensor"),
        (lambda tensors, name: tensors.update({"extra.weight": torch.zeros(3)}), "extra.weight"),
        (lambda tensors, name: tensors.update({name: tensors[name][:-1].clone()}), "has shape"),
        (lambda tensors, name: tensors.update({name: tensors[name].to(torch.int8)}), "is of type I8"),
        (lambda tensors, name: tensors.update({f"net.{key}": tensors.pop(key) for key in list(tensors)}), "tensor"),
    ],
    ids=["missing", "extra", "shape", "int8", "names"],
)
def test_weights_that_are_not_those_of_the_configuration(folder, part, edit, words):
    edit_weights(folder, part, lambda tensors: edit(tensors, NAMES[part]))
    refused(folder, part, words)


def test_older_files_with_constants_and_heads_still_load(folder):
    """Tensors that the libraries have done without for years."""
    edit_weights(folder, "text_encoder", lambda tensors: tensors.update(
        {"text_model.embeddings.position_ids": torch.arange(16)[None], "logit_scale": torch.ones(())}))  # fmt: skip
    edit_weights(folder, "text_encoder_3", lambda tensors: tensors.update({"lm_head.weight": torch.ones(2, 2)}))
    load(folder)


@pytest.mark.parametrize(
    ("entries", "words"),
    mostly_long(
        [
            ({"tokenizer": [None, None]}, "no tokenizer"),
            ({"tokenizer_3": [None, None]}, "text_encoder_3, but no tokenizer_3"),
            ({"vae": None}, "no vae"),
            ({"vae": []}, "no vae"),
            ({"text_encoder": [None, None]}, "no text_encoder"),
            ({"scheduler": ["diffusers"]}, "['diffusers'] as scheduler"),
            ({"transformer": ["diffusers", "AutoencoderKL"]}, "transformer is a AutoencoderKL"),
            ({"text_encoder": ["transformers", "CLIPTextModel"]}, "text_encoder is a CLIPTextModel"),
            ({"vae": ["diffusers", "NoSuchClass"]}, "NoSuchClass"),
            ({"vae": ["my_code", "Decoder"]}, "only classes of diffusers and transformers"),
            ({"../x": ["diffusers", "AutoencoderKL"]}, "../x"),
            ({"_class_name": ["my_pipeline", "Mine"]}, "names no pipeline class"),
            ({"auto_map": {"AutoModel": "mine.Mine"}}, "names code to run (auto_map)"),
        ],
        4,
    ),
)
def test_an_index_of_parts_that_cannot_be(folder, entries, words):
    edit_json(folder / "model_index.json", **entries)
    refused(folder, words)


@pytest.mark.parametrize(
    ("file", "entries", "words"),
    mostly_long(
        [
            ("vae/config.json", {"scaling_factor": None}, "scaling_factor=None"),
            ("vae/config.json", {"scaling_factor": float("nan")}, "scaling_factor=nan"),
            ("vae/config.json", {"scaling_factor": 0}, "scaling_factor=0"),
            ("vae/config.json", {"shift_factor": "much"}, "shift_factor=much"),
            ("vae/config.json", {"block_out_channels": None}, "does not load"),
            ("vae/config.json", {"latent_channels": 3}, "has shape"),
            ("scheduler/scheduler_config.json", {"num_train_timesteps": 0}, "does not load"),
            ("scheduler/scheduler_config.json", {"shift": float("nan")}, "sigmas"),
            ("scheduler/scheduler_config.json", {"shift": 0}, "sigmas"),
            ("transformer/config.json", {"in_channels": None}, "does not load"),
            ("transformer/config.json", {"quantization_config": {"quant_method": "bitsandbytes"}}, "quantised"),
            ("transformer/config.json", {"auto_map": {"AutoModel": "mine.Mine"}}, "transformer/config.json names code"),
            (
                "text_encoder/config.json",
                {"auto_map": {"AutoModel": "mine.Mine"}},
                "text_encoder/config.json names code",
            ),
            ("tokenizer/tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["mine.Mine", None]}}, "names code"),
        ],
        4,
    ),
)
def test_configurations_that_make_no_model(folder, file, entries, words):
    edit_json(folder / file, **entries)
    with pytest.raises(BadInput) as caught:
        skeleton = load_skeleton(ModelConfig(path=str(folder), text_tokens=16), SampleConfig())
        skeleton.sigmas(10)
        load(folder)
    assert caught.value.field == "model.path" and words in str(caught.value) and "\n" not in str(caught.value)


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


PLANTED = ("diffusion_pytorch_model.bin", "pytorch_model.bin", "model.bin", "adapter_model.bin", "weights.pt")


@pytest.fixture
def trap(folder, tmp_path):
    """Pickles in every part of the folder; what they would make when read."""
    made = tmp_path / "made by a pickle"
    pickle.loads(pickle.dumps(Payload(made)))
    assert made.exists()
    made.unlink()
    for part in (*WEIGHTS, "tokenizer", "scheduler", "."):
        for name in PLANTED:
            (folder / part / name).write_bytes(pickle.dumps(Payload(made)))
    return made


def test_pickles_beside_weights_are_not_read(folder, trap):
    load(folder)
    assert not trap.exists()


@pytest.mark.parametrize("part", mostly_long(WEIGHTS, 3))
def test_pickles_in_place_of_weights_are_not_read(folder, trap, part):
    """With an index that names one, which the libraries would follow, and without."""
    (folder / part / f"{WEIGHTS[part]}.safetensors").unlink()
    refused(folder, "does not load")
    write_index(folder / part, WEIGHTS[part], {NAMES[part]: "pytorch_model.bin"})
    refused(folder, f"{part}/", "only .safetensors")
    assert not trap.exists()


def write_index(folder: Path, name: str, weight_map: object) -> None:
    (folder / f"{name}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("file", ["weights.pt", "../vae/x.safetensors", "/etc/x.safetensors", "..", None, ["a"]])
def test_an_index_names_safetensors_of_its_folder_or_nothing(tmp_path, file):
    write_index(tmp_path, "model", {"a": "good.safetensors", "b": file})
    with pytest.raises(BadInput, match=r"model\.path=.*index\.json names .* for b") as caught:
        check_files(tmp_path, Origin("model.path", "here"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "[" * 10**5, "\x00"])
def test_an_index_of_no_sense(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(BadInput, match=r"model\.path=.*model\.safetensors\.index\.json"):
        check_files(tmp_path, Origin("model.path", "here"))


def test_an_index_of_shards_loads(folder):
    """What refuses planted ones lets real ones pass."""
    tensors = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[:50], "b.safetensors": names[50:]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / "transformer" / file, metadata={"format": "pt"})
    write_index(
        folder / "transformer", WEIGHTS["transformer"], {n: file for file, part in shards.items() for n in part}
    )
    found = load(folder).network.module.state_dict()
    assert all(torch.equal(found.get(name, tensor), tensor) for name, tensor in tensors.items())


def test_adapters_that_a_library_would_add_itself(folder, trap):
    (folder / "text_encoder" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    refused(folder, "adapter_config.json")
    assert not trap.exists()


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda tensor: tensor.fill_(float("nan")), "NaN or infinity"),
        (lambda tensor: tensor.to(torch.int8), "is of type I8"),
    ],
)
def test_a_lora_of_no_numbers(tmp_path, edit, words):
    load_policy(ModelConfig(text_tokens=16), SampleConfig(), torch.device("cpu")).save(tmp_path)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    tensors = load_file(file)
    name = min(tensors)
    save_file(tensors | {name: edit(tensors[name])}, file, metadata={"format": "pt"})
    with pytest.raises(BadInput, match=f"model.lora=.*{words}") as caught:
        load_policy(ModelConfig(text_tokens=16, lora=str(tmp_path)), SampleConfig(), torch.device("cpu"))
    assert name.removeprefix("transformer.") in str(caught.value) and "\n" not in str(caught.value)


def test_a_pickled_lora_is_not_read(tmp_path):
    made = tmp_path / "made"
    for name in ("pytorch_lora_weights.bin", "pytorch_lora_weights.safetensors"):
        (tmp_path / name).write_bytes(pickle.dumps(Payload(made)))
        with pytest.raises(BadInput, match=r"model\.lora="):
            load_policy(ModelConfig(text_tokens=16, lora=str(tmp_path / name)), SampleConfig(), torch.device("cpu"))
    (tmp_path / "pytorch_lora_weights.safetensors").unlink()
    with pytest.raises(BadInput, match=r"model\.lora="):
        load_policy(ModelConfig(text_tokens=16, lora=str(tmp_path)), SampleConfig(), torch.device("cpu"))
    assert not made.exists()


def test_a_light_decoder_of_no_numbers(folder):
    edit_weights(folder, "vae", lambda tensors: tensors[NAMES["vae"]].fill_(float("nan")))
    policy = load(PACKAGE / "digits" / "pipeline")
    with pytest.raises(BadInput, match=rf"tails.decoder=.*{NAMES['vae']} holds NaN"):
        policy.light_decoder(str(folder / "vae"), False)


def test_every_kind_of_number_is_seen():
    good = {
        "a": torch.ones(3),
        "b": torch.full((2, 2), 6e4, dtype=torch.float16),
        "c": torch.arange(3),
        "d": torch.ones(0),
    }
    bad = {"e": torch.tensor([1.0, float("nan")]), "f": torch.tensor([float("inf")], dtype=torch.bfloat16),
           "g": torch.tensor([[-float("inf"), 0.0]], dtype=torch.float16)}  # fmt: skip
    assert nonfinite(good) == [] and nonfinite(good | bad) == ["e", "f", "g"]
