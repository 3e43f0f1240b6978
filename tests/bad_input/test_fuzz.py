"""Whatever bytes the readers get, they read them or refuse them by BadInput: no other exception, no waiting."""

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tempflow.common.errors import BadInput, shown
from tempflow.common.yaml_values import Unreadable, read_yaml, to_yaml
from tempflow.prompts import read_prompts
from tempflow.records.rows import read_metrics
from tempflow.records.shape import check_drawable
from tempflow.rewards.parts.options import read_options
from tempflow.rewards.servers.limits import Limits
from tempflow.rewards.servers.wire import Malformed, unpack_request
from tempflow.settings.fields import Config
from tempflow.settings.names import field_names
from tempflow.settings.reading import load
from tempflow.studies.compare.study import Study, read_study

WORDS = st.sampled_from(["learn", "lr", "run", "dir", "seed", "reward", "name", "options", "extends", "digits", "null",
                         "true", "007", "1e5", ".inf", "0x1f", "~", "&a", "*a", "!!str", "!!int", "!!python/name:x",
                         "{", "}", "[", "]", ": ", ", ", "- ", "? ", "#", "'", '"', "|", ">", "\n", "\n  ", "\t", "%",
                         "---\n", "...", "\\", "\0", "\ufeff", "\u2028", "\ud800", "<<", "=", "prompt"])  # fmt: skip
TEXTS = st.lists(st.one_of(WORDS, st.text(max_size=8)), max_size=24).map("".join)
"""Words of the languages that are read, in any order, and anything else between them."""
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
often = settings(
    max_examples=80, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def answered(work, *arguments, refusal: type[Exception] = BadInput):
    """What `work` gives, or None where it refuses in one line."""
    try:
        return work(*arguments)
    except refusal as error:
        assert "\n" not in str(error) and str(error).isprintable()
        return None


def written(folder: Path, name: str, text: str | bytes) -> str:
    """The path of a file of that text."""
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    (folder / name).write_bytes(data)
    return str(folder / name)


@often
@given(st.sampled_from(field_names()), TEXTS)
def test_overrides(name, text):
    found = answered(load, [f"{name}={text}"])
    assert found is None or isinstance(found, Config)


@often
@given(TEXTS | st.binary(max_size=60))
def test_settings_files(tmp_path, text):
    answered(load, [written(tmp_path, "own.yaml", text)])


@often
@given(st.dictionaries(st.sampled_from(["learn", "run", "reward", "x"]), JSON, max_size=3))
def test_settings_of_any_value(tmp_path, values):
    answered(load, [written(tmp_path, "own.yaml", yaml.safe_dump(values))])


@often
@given(JSON.filter(lambda value: "\\ud" not in json.dumps(value) and "\\u0000" not in json.dumps(value)))
def test_what_is_written_is_read_again(value):
    """Floats in full and words as words, by the rules of both versions of YAML."""
    text = to_yaml(value)
    assert repr(read_yaml(text)) == repr(value)
    assert repr(yaml.safe_load(text)) == repr(value)


@often
@given(TEXTS)
def test_values(text):
    answered(read_yaml, text, refusal=Unreadable)
    answered(read_options, [text, f"digits.{text}", f"digits.x={text}"], ["digits", "ocr"])


@often
@given(st.sampled_from(["a.txt", "a.jsonl", "a"]), TEXTS | st.binary(max_size=60) | JSON.map(json.dumps))
def test_prompts(tmp_path, name, text):
    for prompt in answered(read_prompts, written(tmp_path, name, text), "prompts.train") or ():
        assert prompt.text.strip() == prompt.text.strip() != "" and prompt.text.encode()
        assert isinstance(prompt.metadata, dict) and "\0" not in prompt.text


STUDY = {"name": "a", "runs": {"x": ["digits"]}, "seeds": [1], "budget": {"iterations": 1}}


@often
@given(st.dictionaries(st.sampled_from(list(Study.model_fields)), JSON | TEXTS, max_size=2), TEXTS)
def test_studies(tmp_path, changes, text):
    path = written(tmp_path, "own.yaml", to_yaml(STUDY | changes).encode("utf-8", "surrogatepass"))
    answered(read_study, path)
    answered(read_study, written(tmp_path, "own.yaml", text))


FIELDS = st.sampled_from(["step", "seconds", "reward_mean", "reward_std_per_step", "gold", "gold_fall", "phase_seconds",
                          "loss_weights", "picture_prompts", "x"])  # fmt: skip


@often
@given(st.lists(st.dictionaries(FIELDS, JSON | st.integers(0, 3), max_size=4), max_size=3), TEXTS)
def test_metrics(tmp_path, rows, text):
    lines = "".join(json.dumps({"step": number} | row) + "\n" for number, row in enumerate(rows))
    path = Path(written(tmp_path, "metrics.jsonl", lines + text))
    found = answered(read_metrics, path)
    if found:
        answered(check_drawable, found, path)


@often
@given(JSON, st.binary(max_size=40), st.integers(-9, 9))
def test_requests(header, images, shift):
    text = json.dumps(header).encode()
    body = bytearray(max(0, len(text) + shift).to_bytes(8, "little") + text + images)
    answered(unpack_request, body, Limits(), refusal=Malformed)


@often
@given(st.text() | JSON)
def test_any_value_is_shown_on_one_line(value):
    assert shown(value).isprintable() and len(shown(value)) < 400


def test_the_reader_refuses_what_the_library_would_run():
    for tag in ("!!python/object/apply:os.system [x]", "!!python/name:os.system ''", "!!binary aGk=", "!!set {a, b}",
                "!!timestamp 2024-01-01", "!!omap [a: 1]", "!own x"):  # fmt: skip
        with pytest.raises(Unreadable, match="tag"):
            read_yaml(f"a: {tag}")
