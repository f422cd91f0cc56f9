"""The base class of all sections: strict, frozen, closed."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
"""Pattern of a sweep's name, which is also the name of its folder."""

PositiveInt = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
"""A seed that every library accepts: numpy takes none below 0, and Python's `random` treats -1 as 1."""


_TOO_LARGE = 2**1023


class Section(BaseModel):
    """A part of an experiment file. Strict (no silent conversion), frozen, and closed (unknown fields are refused)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, defer_build=True)


def require_floats(document: Any) -> Any:
    """Return a document as it is.

    Raises:
        ValueError: a whole number in it is too large for a float. Rules that compute with it would raise OverflowError.
    """
    values = document.values() if isinstance(document, dict) else document if isinstance(document, list) else ()
    for value in values:
        if isinstance(value, int) and abs(value) >= _TOO_LARGE:
            raise ValueError(f"a number of {value.bit_length()} bits is too large; at most 1023 fit into a float")
        require_floats(value)
    return document


class RootSection(Section):
    """A section that is also read by itself, and may hold any number somewhere within."""

    @model_validator(mode="before")
    @classmethod
    def _holds_floats(cls, document: Any) -> Any:
        return require_floats(document)
