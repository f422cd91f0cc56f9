"""The base class of all sections: strict, frozen, closed."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
"""Pattern of a sweep's name, which is also the name of its folder."""

PositiveInt = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
"""A seed that every library accepts: numpy takes none below 0, and Python's `random` treats -1 as 1."""


class Section(BaseModel):
    """A part of an experiment file. Strict (no silent conversion), frozen, and closed (unknown fields are refused)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, defer_build=True)
