"""How a run ends early, and who speaks."""

import pytest

from tempflow.common.errors import BadInput, Halted
from tempflow.common.say import is_first, say


@pytest.mark.parametrize("kind", [BadInput, Halted])
def test_an_error_is_one_line_of_field_value_and_hint(kind):
    error = kind("learn.rows", 5, "give 4")
    assert str(error) == "learn.rows=5: give 4"
    assert (error.field, error.value, error.hint) == ("learn.rows", 5, "give 4")


def test_wrong_input_and_a_stopped_run_are_told_apart():
    assert issubclass(BadInput, ValueError) and not issubclass(Halted, (BadInput, ValueError))


@pytest.mark.parametrize(("rank", "told"), [(None, "tempflow: a word\n"), ("0", "tempflow: a word\n"), ("1", "")])
def test_only_the_first_process_speaks(monkeypatch, capsys, rank, told):
    if rank is None:
        monkeypatch.delenv("RANK", raising=False)
    else:
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
    say("a word")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", told) and is_first() == bool(told)
