"""Where a search begins: the learning rate that fits the base, and the other values around which good ones lie."""

import math
from typing import Any

from orchestrator.base_folder import config_document
from orchestrator.spec import SweepSpec
from orchestrator.spec.axes import Axis
from orchestrator.spec.dotted import read_path
from orchestrator.spec.search import RATE, SearchSection
from orchestrator.spec.sections import BaseSection

RANK = "lora.rank"

_RATE_AT_WIDTH_2000 = 5e-4
_EXPONENTS = {"llama": 0.781, "qwen": 0.0775}
"""Beginning of a base's model_type -> exponent of its width."""
_OTHER_EXPONENT = 0.43
"""Exponent for other families: the mean of the two (ours)."""


def rate_of(width: int, family: str) -> float:
    """Return the learning rate at which LoRA trains well on a base.

    5e-4 * (2000 / width) ** exponent: ten times the rate of full fine-tuning, fitted to sweeps over rates on bases of
    both families by Thinking Machines (tinker-cookbook, `tinker_cookbook/hyperparam_utils.py` at 55cec7f, `get_lr`).
    The optimum hardly depends on the rank (Schulman et al., LoRA Without Regret, 2025).

    Args:
        width: size of the hidden states.
        family: model_type of the base.
    """
    exponent = next((each for name, each in _EXPONENTS.items() if family.startswith(name)), _OTHER_EXPONENT)
    return float(f"{_RATE_AT_WIDTH_2000 * (2000 / width) ** exponent:.3g}")


def width_and_family(base: BaseSection) -> tuple[int, str] | None:
    """Return the size of the hidden states and the model_type; None if the base's configuration does not say them."""
    config = config_document(base)
    for part in (config, config.get("text_config") or {}):
        for name in ("hidden_size", "n_embd", "d_model"):
            if isinstance(width := part.get(name), int) and width > 0:
                return width, str(part.get("model_type") or config.get("model_type") or "")
    return None


def with_prior(spec: SweepSpec) -> tuple[SweepSpec, list[str]]:
    """Complete `search.prior` where the search begins at one, so that the record holds all of it.

    The rate is the one that the experiment gives, else that of `rate_of`; the rank is the largest one; other fields
    have the experiment's own value. Values that are not on their axis are replaced by the nearest ones.

    Returns:
        The experiment, and what to tell the user about it.
    """
    search = spec.search
    if search.algorithm != "auto" or not search.space or set(search.written_prior) == set(search.space):
        return spec, []
    document = spec.model_dump(mode="json")
    prior, said = dict(search.written_prior), []
    if RATE in search.space and RATE not in prior:
        rate, why = _rate(spec)
        prior[RATE] = nearest(search.space[RATE], rate)
        said.append(f"search: learning rates begin around {prior[RATE]:.3g}: {why}")
    for path, axis in search.space.items():
        if path not in prior and (value := _start(path, axis, read_path(document, path))) is not None:
            prior[path] = value
    document["search"]["prior"] = prior
    return SweepSpec.model_validate(document), said


def begin_at(spec: SweepSpec, prior: dict[str, Any]) -> SweepSpec:
    """Return the experiment with another `search.prior`. `_rate` can still tell which fields the file gives."""
    search = SearchSection.model_validate(spec.search.model_dump(mode="json") | {"prior": prior})
    return spec.model_copy(update={"search": search})


def nearest(axis: Axis, number: float) -> Any:
    """Return the value of an axis of numbers that is nearest to a number, by ratio where all are positive."""
    if not axis.is_discrete:
        return axis.nearest(number)
    by_ratio = number > 0 and min(axis.values) > 0
    return min(axis.values, key=lambda value: abs(math.log(value / number)) if by_ratio else abs(value - number))


def _rate(spec: SweepSpec) -> tuple[float, str]:
    if "learning_rate" in spec.training.model_fields_set:
        return spec.training.learning_rate, "the experiment's own training.learning_rate"
    found = width_and_family(spec.base)
    if found is None:
        return _RATE_AT_WIDTH_2000, "the base's configuration does not give its width, which would say more"
    width, family = found
    return rate_of(width, family), f"{family or 'a base'} of width {width} (see docs/choosing.md)"


def _start(path: str, axis: Axis, own: Any) -> Any:
    """Return the value at which a field begins; None if the experiment's own value is not among those of a category."""
    values = axis.probes()
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return own if axis.holds(own) else None
    if path == RANK:
        return max(values)
    return nearest(axis, own) if isinstance(own, int | float) else None
