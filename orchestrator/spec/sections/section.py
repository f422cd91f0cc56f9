"""What all sections are: strict, frozen, closed."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
"""A sweep's name: one folder of its own."""

PositiveInt = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
"""One that every library takes: numpy knows none below 0, and to Python's own -1 is 1."""


class Section(BaseModel):
    """Strict (no silent conversion), frozen, and closed (unknown fields are refused)."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
