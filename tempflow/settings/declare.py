"""How settings are declared: types of values, and the mark of those that a resumed run may change."""

from __future__ import annotations

from dataclasses import MISSING
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
Count = Annotated[int, Field(ge=1, lt=2**31)]
Whole = Annotated[int, Field(ge=0, lt=2**31)]
Steps = Annotated[int, Field(ge=2, le=1000)]
Seconds = Annotated[float, Field(gt=0, le=1e8)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Name = Annotated[str, Field(pattern=r"^[0-9A-Za-z_.+-]{1,64}$")]
Precision = Literal["fp32", "bf16", "fp16"]


def changeable(default: Any = MISSING, make: Any = None) -> Any:
    """A field that may differ when a run is resumed, since it changes nothing of what was learnt so far."""
    mark = {"changeable": True}
    return Field(default_factory=make, json_schema_extra=mark) if make else Field(default, json_schema_extra=mark)


def section(cls: type) -> type:
    """A frozen, keyword-only, checked dataclass whose field descriptions are the sentences under the fields."""
    return dataclass(cls, frozen=True, kw_only=True, config=STRICT)


