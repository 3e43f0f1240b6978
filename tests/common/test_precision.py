"""Which precision is taken where none is named: bf16 on a GPU, and what suits a CPU."""

import pytest
import torch

from tempflow.common.errors import BadInput
from tempflow.common.precision import default_precision
from tempflow.models.loading import dtypes
from tempflow.rewards.geneval.scorer import GenEval
from tempflow.rewards.parts.weights import dtype_of
from tempflow.settings.fields import ModelConfig

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


def test_bf16_on_a_gpu_and_fp32_on_a_cpu():
    assert [default_precision(device) for device in (GPU, "cuda", "meta", CPU)] == ["bf16", "bf16", "bf16", "fp32"]


@pytest.mark.parametrize("device", [GPU, "cuda:1"])
def test_scorers_take_bf16_on_a_gpu_unless_told_otherwise(device):
    assert dtype_of("pickscore", None, device) == torch.bfloat16
    assert dtype_of("pickscore", None, CPU) == torch.float32
    for name, dtype in (("fp32", torch.float32), ("fp16", torch.float16)):
        assert dtype_of("pickscore", name, device) == dtype
    with pytest.raises(BadInput, match=r"pickscore.dtype=fp8"):
        dtype_of("pickscore", "fp8", device)


def test_answers_that_are_counted_stay_in_fp32():
    assert GenEval.dtype == "fp32"


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_the_decoder_takes_bf16_on_a_gpu_unless_told_otherwise(dtype):
    own = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    model = ModelConfig(dtype=dtype)
    assert dtypes(model, GPU)["vae"] == torch.bfloat16 and dtypes(model, CPU)["vae"] == own
    assert dtypes(model, GPU)["transformer"] == dtypes(model, GPU)["text"] == own
    assert dtypes(ModelConfig(dtype=dtype, vae_dtype="fp32"), GPU)["vae"] == torch.float32
