"""What configurations and settings of models may name: no code, and no file out of its place."""

from __future__ import annotations

import json

import pytest
import torch

from tempflow.common.errors import BadInput
from tempflow.common.files import resolve
from tempflow.models.load import load_policy
from tempflow.models.weights.files import check_files
from tempflow.models.weights.origin import Origin
from tempflow.settings.fields import ModelConfig, SampleConfig


@pytest.mark.parametrize("entry", ["auto_map", "custom_pipelines", "trust_remote_code"])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_configurations_that_name_code(tmp_path, file, entry):
    (tmp_path / file).write_text(json.dumps({entry: "x"}))
    with pytest.raises(BadInput, match=rf"model\.path=.*{file} names code to run \({entry}\)"):
        check_files(tmp_path, Origin("model.path", "here"))


@pytest.mark.parametrize("field", ["path", "lora", "text_cache"])
@pytest.mark.parametrize("path", ["tempflow:../../etc", "tempflow:/etc", "tempflow:digits/../../x"])
def test_paths_into_the_package_stay_there(field, path):
    with pytest.raises(BadInput, match=rf"model.{field}=.*leaves it"):
        load_policy(ModelConfig(text_tokens=16, **{field: path}), SampleConfig(), torch.device("cpu"))


def test_a_path_may_turn_within_the_package():
    assert resolve("tempflow:digits/../digits/pipeline").is_dir()
