"""What tests of settings share."""

from collections.abc import Callable, Sequence

import pytest

from tempflow.common.errors import BadInput
from tempflow.settings.reading import load


@pytest.fixture
def refusal() -> Callable[[Sequence[object]], BadInput]:
    """Gives the error that a command line is answered with, which has to be one line."""

    def refuse(arguments: Sequence[object]) -> BadInput:
        with pytest.raises(BadInput) as caught:
            load([str(argument) for argument in arguments])
        assert "\n" not in str(caught.value)
        return caught.value

    return refuse
