"""Declare which part of the program acts on a field, so that no field is silently ignored.

Every field of the base, lora and training sections has such a declaration in its type:

    rank: Annotated[PositiveInt, ENGINES] = 16

`TrialConfig.fast_unsupported_reason` follows from the declarations. `tests/unit/spec/test_honored.py` refuses a field
without one, and a declaration that the source code does not keep.

To add a field: write it into its section with its bounds, its declaration and its documentation. Read it in the code
that the declaration names, as `config.training.FIELD` or `training.FIELD`. Run `make manual`.
"""

from dataclasses import dataclass
from typing import Any

from pydantic.fields import FieldInfo


@dataclass(frozen=True)
class HonoredBy:
    """Who acts on a field. The fast engine refuses a value of a field that it does not act on, except the default."""

    fast: bool = False
    """Whether the fast engine does."""
    trl: bool = False
    """Whether engine trl does."""
    orchestrator: bool = False
    """Whether code around the engines does: it loads the base, chooses the engine, draws trials."""
    fast_values: tuple[Any, ...] | None = None
    """The only values with which the fast engine can train; None if this follows from the other fields."""

    def fast_supports(self, value: Any, default: Any) -> bool:
        """Whether the fast engine can train a trial whose field has this value."""
        if self.fast_values is not None:
            return value in self.fast_values
        return self.fast or not self.trl or value == default


ENGINES = HonoredBy(fast=True, trl=True)
"""Both engines act on the field."""
TRL_ONLY = HonoredBy(trl=True)
"""Only engine trl acts on the field; `auto` chooses it if the field is set."""
FAST_ONLY = HonoredBy(fast=True)
"""Only the fast engine acts on the field."""
ORCHESTRATOR = HonoredBy(orchestrator=True)
"""The code around the engines acts on the field."""


def honored_by(field: FieldInfo) -> HonoredBy:
    """Return a field's declaration.

    Raises:
        ValueError: it has none.
    """
    for note in field.metadata:
        if isinstance(note, HonoredBy):
            return note
    raise ValueError("the field does not declare who honors it (orchestrator.spec.sections.honored)")
