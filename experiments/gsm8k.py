"""Metric of GSM8K for `evaluation.metrics`: is the final number right, however it was reached?"""

import re

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def final_number(_: list[str], answers: list[str], references: list[str]) -> list[float]:
    """Return 1 for each answer whose last number is the one after `####` of the reference, else 0."""
    return [float(_last(answer) == _last(reference)) for answer, reference in zip(answers, references, strict=True)]


def _last(text: str) -> float | None:
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None
