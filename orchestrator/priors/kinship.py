"""Which sweeps say something about each other: those of one family of bases, of about one size, on one kind of data."""

import math
from dataclasses import dataclass
from typing import Final

from orchestrator.rate_prior import width_and_family
from orchestrator.spec import SweepSpec
from orchestrator.spec.sections import DataSection

SIZE_CLASS: Final = 1.5
"""Widths of one size class differ by this factor at most."""


@dataclass(frozen=True)
class Kin:
    """The base and the data of a sweep, as far as good values depend on them."""

    family: str
    """model_type of the base."""
    width: int
    """Size of the base's hidden states."""
    data: str
    """Format of the rows, and which part of them is in the loss."""

    @classmethod
    def of(cls, spec: SweepSpec) -> "Kin | None":
        """Return the kin of an experiment; None if its base's configuration is not here or does not give the width."""
        found = width_and_family(spec.base)
        return None if found is None or not found[1] else cls(found[1], found[0], data_kind(spec.data))

    def difference(self, other: "Kin") -> str | None:
        """Return in words why this one says nothing about another; None if it does."""
        if self.family != other.family:
            return f"its base is of family {self.family}, and this one of {other.family}"
        if abs(math.log(self.width / other.width)) > math.log(SIZE_CLASS):
            return f"its base has width {self.width}, and this one {other.width}: more than a factor of {SIZE_CLASS}"
        if self.data != other.data:
            return f"its rows are {self.data}, and these are {other.data}"
        return None

    def __str__(self) -> str:
        return f"{self.family} of width {self.width}, {self.data}"


def data_kind(data: DataSection) -> str:
    """Return the kind of a data section in words."""
    return f"{data.format} with loss on {data.loss_on}"
