"""Which values of the searched fields the trials have tried, and which fields move together."""

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, Final

from orchestrator.analysis.effects import Coordinate, coordinate_of
from orchestrator.analysis.importance import MIN_TRIALS
from orchestrator.analysis.sweep_data import SweepData
from orchestrator.analysis.wording import listed, say_short
from orchestrator.spec.search import SEED

_UNEVEN: Final = 4
"""Trials at the most frequent value for one at the rarest (and one more) from which values count as uneven."""
_MOST_VALUES: Final = 8
"""Listed values beyond which a field is looked at in thirds of its list."""
_THIRDS: Final = ("in the lowest third of its range", "in the middle third", "in the highest third")


def moves_with(data: SweepData, field: str) -> list[str]:
    """Return the tied fields whose expressions name a searched field."""
    name = re.compile(rf"(?<![\w.]){re.escape(field)}(?![\w.])")
    return [tied for tied, expression in data.info.spec.search.tied.items() if name.search(expression)]


def say_tied(data: SweepData) -> Iterator[str]:
    """Yield a sentence for each tied field: an effect of a searched field is that of both together."""
    for name, expression in data.info.spec.search.tied.items():
        moving = [each for each in data.fields() if name in moves_with(data, each)]
        if moving:
            verb = "moves" if len(moving) == 1 else "move"
            yield (
                f"{name} is tied: it is always {expression}. So {listed(moving)} {verb} with {name}, and their effects "
                "cannot be told apart."
            )


def say_coverage(data: SweepData) -> Iterator[str]:
    """Yield a sentence on the fields whose values were tried very unevenly."""
    uneven = []
    for name in data.fields():
        given = [trial.config.varied[name] for trial in data.trials if name in trial.config.varied]
        coordinate = coordinate_of(data.info.spec.search.space[name])
        if name == SEED or len(given) < MIN_TRIALS:
            continue
        counts = _counts(coordinate, given)
        if max(counts.values()) >= _UNEVEN * (min(counts.values()) + 1):
            first, *others = [f"{number} {place}" for place, number in counts.items()]
            word, _, rest = first.partition(" ")
            uneven.append(f"{name}: {word} {'trial' if word == '1' else 'trials'} {rest}, {', '.join(others)}")
    if uneven:
        yield f"Values were tried unevenly, and little is known of the rare ones. {'; '.join(uneven)}."


def _counts(coordinate: Coordinate, given: list[Any]) -> dict[str, int]:
    """Return how many trials there are at each value, or in each third of a range or a long list."""
    if coordinate.values and len(coordinate.values) <= _MOST_VALUES:
        found = Counter(repr(value) for value in given)
        return {f"at {say_short(value)}": found[repr(value)] for value in coordinate.values}
    if coordinate.is_category:
        return {"at each value": 0}
    thirds = Counter(min(max(int((coordinate.at(value) + 1) * 1.5), 0), 2) for value in given)
    return {place: thirds[number] for number, place in enumerate(_THIRDS)}
