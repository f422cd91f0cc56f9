"""How much of a base is quantized, and how much memory its weights take."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from orchestrator.base_weights import loading_config
from orchestrator.spec.sections import BaseSection
from orchestrator.words import say_gib

FEW = 0.85
"""A trial warns if a smaller share of a quantized base is quantized. Large dense bases reach 0.86: embedding and head
stay in 16 bits."""

_GIB, _MAX_NAMED = 2**30, 3
_sizes: WeakKeyDictionary[Any, "BaseSize"] = WeakKeyDictionary()


@dataclass(frozen=True)
class BaseSize:
    """The size of a base."""

    num_quantized: int
    """Number of weights that are quantized."""
    plain: Mapping[str, int]
    """Name of a parameter, with `*` for numbers in it -> number of weights that are not quantized."""
    num_bytes: int
    """Size of all weights and their scales."""

    @classmethod
    def of(cls, model: Any) -> "BaseSize":
        """Measure a loaded base without an adapter. The first call looks at every parameter."""
        if model not in _sizes:
            _sizes[model] = cls._measured(model)
        return _sizes[model]

    @classmethod
    def _measured(cls, model: Any) -> "BaseSize":
        num_quantized, num_bytes, plain = 0, 0, Counter[str]()
        for name, parameter in model.named_parameters():
            number, scales = _quantized(parameter)
            num_quantized += number
            num_bytes += parameter.nbytes + scales
            if not number:
                plain[_by_kind(name)] += parameter.numel()
        return cls(num_quantized, dict(plain), num_bytes)

    @classmethod
    def foreseen(cls, base: BaseSection, model: Any) -> "BaseSize":
        """Foresee the size of a base without its weights: what transformers and this project select to be quantized.

        Args:
            base: its section.
            model: the model on the meta device; it is changed.
        """
        from transformers.quantizers import AutoHfQuantizer

        config = loading_config(base)
        quantizer = None if config is None else AutoHfQuantizer.from_config(config, pre_quantized=False)
        if quantizer is not None:
            quantizer.preprocess_model(model=model, device_map=None)
        scales = (1 + 4 / 256 if base.double_quant else 4) / 64
        bytes_each = {"none": 0.0, "int8": 1.0}.get(base.quantization, 0.5 + scales)
        num_quantized, num_bytes, plain = 0, 0.0, Counter[str]()
        for name, parameter in model.named_parameters():
            if quantizer is not None and quantizer.param_needs_quantization(model, name):
                num_quantized += parameter.numel()
                num_bytes += parameter.numel() * bytes_each
            else:
                plain[_by_kind(name)] += parameter.numel()
                num_bytes += parameter.numel() * (4 if base.compute_dtype == "float32" else 2)
        return cls(num_quantized, dict(plain), int(num_bytes))

    @property
    def quantized_share(self) -> float:
        """Share of the weights that are quantized."""
        return self.num_quantized / (self.num_quantized + sum(self.plain.values()))

    @property
    def gib(self) -> float:
        """Size in GiB."""
        return self.num_bytes / _GIB

    def warning(self, base: BaseSection) -> str | None:
        """Return a warning that names the largest weights in 16 bits, if too few of a quantized base are quantized.

        Args:
            base: the section that the base was loaded from.
        """
        if base.quantization == "none" or self.quantized_share >= FEW:
            return None
        total = self.num_quantized + sum(self.plain.values())
        largest = sorted(self.plain.items(), key=lambda item: -item[1])[:_MAX_NAMED]
        named = ", ".join(f"{name} ({number / total:.0%})" for name, number in largest if number >= 0.01 * total)
        return (
            f"base.quantization {base.quantization}: only {self.quantized_share:.0%} of the base's weights are in "
            f"{_bits(base)} bits ({say_gib(self.gib)} in all); not quantized are {named}"
        )

    def say(self, base: BaseSection) -> str:
        """Return a phrase such as `97% of its weights are in 4 bits, 17.3 GiB in all`."""
        if base.quantization == "none":
            return f"its weights take {say_gib(self.gib)}"
        return f"{self.quantized_share:.0%} of its weights are in {_bits(base)} bits, {say_gib(self.gib)} in all"


def _by_kind(name: str) -> str:
    """Return the name of a parameter with `*` for numbers in it."""
    return re.sub(r"\.\d+(?=\.)", ".*", name)


def _bits(base: BaseSection) -> int:
    return 8 if base.quantization == "int8" else 4


def _quantized(parameter: Any) -> tuple[int, int]:
    """Return how many weights a parameter holds in quantized form, and the bytes of their scales; (0, 0) for others."""
    from bitsandbytes.nn import Int8Params, Params4bit

    from orchestrator.experts import PackedExperts

    if isinstance(parameter, PackedExperts):
        return parameter.num_weights, parameter.scales.nbytes
    if isinstance(parameter, Params4bit):
        state = parameter.quant_state
        tensors = [state.absmax, *([state.state2.absmax] if state.nested else [])]
        return state.shape.numel(), sum(each.nbytes for each in tensors)
    if isinstance(parameter, Int8Params):
        return parameter.numel(), 0 if parameter.SCB is None else parameter.SCB.nbytes
    return 0, 0
