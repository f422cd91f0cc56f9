"""The trials that an experiment can have: points of its search space, and the configuration at each point."""

import itertools
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.spec.dotted import read_path, write_keys
from orchestrator.spec.search import SearchSection
from orchestrator.spec.sections import Section, TrialConfig
from orchestrator.spec.tied_values import evaluate_tied

TRIAL_SECTIONS = ("base", "data", "lora", "training", "evaluation")
"""Sections of an experiment that a trial has too."""

Point = Mapping[str, Any]
"""Dotted field -> value, for each searched field."""

_MAX_COMBINATIONS = 256


@dataclass(frozen=True)
class TrialSpace:
    """Makes trial configurations out of an experiment's sections and points of its search space."""

    sections: Mapping[str, Section]
    """The experiment's own sections, by name (`TRIAL_SECTIONS`); trials differ in searched and tied fields."""
    search: SearchSection
    continues_trials: bool
    """Whether the scheduler lets trials continue from the checkpoint of an evaluation."""

    def config(self, point: Point) -> TrialConfig:
        """Return the configuration of one trial.

        Args:
            point: a value for each axis of the search space; fields that do not exist there, as their `when` says, are
                left out.

        Raises:
            ValueError: a value or a tied expression does not fit its field.
        """
        document: dict[str, Any] = {name: each.model_dump(mode="json") for name, each in self.sections.items()}
        varied = self.search.active(point)
        for path, value in varied.items():
            write_keys(document, path.split("."), value)
        self._write_tied(document, varied)
        training = document["training"]
        if self.continues_trials and training["save_steps"] is None:
            training["save_steps"] = training["eval_steps"]
        return TrialConfig.model_validate({**document, "varied": varied})

    def edges(self) -> list[dict[str, Any]]:
        """Return points that differ from a first one along one axis (and in the fields which that axis depends on)."""
        probes = {path: axis.probes() for path, axis in self.search.space.items()}
        first = {path: values[0] for path, values in probes.items()}
        return [
            self.search.active(first | self.search.needed(path) | {path: value})
            for path, values in probes.items()
            for value in values
        ] or [{}]

    def combinations(self) -> list[dict[str, Any]]:
        """Return every combination of the axes' probes, or a seeded sample if there are very many."""
        probes = {path: axis.probes() for path, axis in self.search.space.items()}
        if math.prod(map(len, probes.values())) <= _MAX_COMBINATIONS:
            points = [dict(zip(probes, values, strict=True)) for values in itertools.product(*probes.values())]
        else:
            rng = random.Random(0)
            points = [{path: rng.choice(values) for path, values in probes.items()} for _ in range(_MAX_COMBINATIONS)]
        return [self.search.active(point) for point in points]

    def _write_tied(self, document: dict[str, Any], varied: dict[str, Any]) -> None:
        """Evaluate the tied fields in their order; write them into the document and into `varied`."""
        unresolved = set(self.search.tied)

        def lookup(path: str) -> Any:
            if path in unresolved:
                raise ValueError(
                    f"reads {path}, which is tied itself; a tied field may read only those written before it"
                )
            try:
                return read_path(document, path)
            except (KeyError, TypeError):
                raise ValueError(f"there is no field {path}") from None

        for path, expression in self.search.tied.items():
            if path in varied:  # somebody has asked for a trial with this value
                unresolved.remove(path)
                continue
            try:
                varied[path] = evaluate_tied(expression, lookup)
            except ValueError as error:
                raise ValueError(f"search.tied.{path} {error}") from error
            write_keys(document, path.split("."), varied[path])
            unresolved.remove(path)
