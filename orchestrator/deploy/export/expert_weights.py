"""The weights of fused experts in a base's files: their values as in training, and with an adapter's update.

Files hold the experts of a layer as one tensor for each expert (`experts.3.up_proj.weight`), or all in one tensor.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.deploy.export.base_files import BaseFiles
from orchestrator.errors import RequestError
from orchestrator.upstream import renamed_weights


@dataclass(frozen=True)
class ExpertLora:
    """The LoRA update of a parameter of fused experts, by PEFT's layout: see `experts.per_expert`."""

    a: str
    b: str
    """Names of the two matrices in the adapter's file: (experts * rank, in) and (out, rank * experts)."""
    scale: float


@dataclass(frozen=True)
class StoredExperts:
    """A tensor of a base's files that holds weights of fused experts."""

    parameter: str
    """Name of the model's parameter that it becomes a part of."""
    num_experts: int
    is_transposed: bool
    """Whether the parameter is (experts, in_features, out_features)."""
    num_parts: int
    """Number of matrices, one below the other, that are quantized separately."""
    expert: int | None = None
    """Number of its expert; None for a tensor that holds all experts, which has the parameter's shape."""
    part: int = 0
    """Number of its matrix among the expert's parts."""
    update: ExpertLora | None = None

    def as_trained(self, weight: Any, quant_type: str, double_quant: bool) -> Any:
        """Return the weight as it is after quantization to 4 bits.

        Args:
            weight: in the type in which the base computes.
            quant_type, double_quant: see `PackedExperts.quantized`.
        """
        from orchestrator.experts import PackedExperts

        if self.expert is not None:
            return PackedExperts.quantized(weight[None], quant_type, double_quant).expert(0)
        return PackedExperts.quantized(weight, quant_type, double_quant, num_parts=self.num_parts).dequantized()

    def delta(self, a: Any, b: Any, scale: float) -> Any:
        """Return the update in the shape of the stored tensor.

        Args:
            a, b: the two matrices in float32.
            scale: factor of their products.
        """
        from orchestrator.experts import per_expert

        a, b = per_expert(a, b, self.num_experts)
        if self.expert is None:
            whole = (b @ a).mul_(scale)
            return whole.mT.contiguous() if self.is_transposed else whole
        return (b[self.expert].chunk(self.num_parts)[self.part] @ a[self.expert]).mul_(scale)


def expert_update(
    name: str, matrices: str, layer: Any, shapes: Mapping[str, tuple[int, ...]], folder: Path
) -> ExpertLora:
    """Return the update of a parameter of fused experts.

    Args:
        name: name of PEFT's wrapper.
        matrices: how the names of its matrices begin in the adapter's file.
        layer: the wrapper, on the meta device.
        shapes: shape of each tensor of the adapter's file.
        folder: the adapter's, for messages.

    Raises:
        RequestError: the file has no such matrices, or of other shapes.
    """
    update = ExpertLora(f"{matrices}A.weight", f"{matrices}B.weight", layer.scaling["default"])
    expected = tuple(layer.lora_A["default"].weight.shape), tuple(layer.lora_B["default"].weight.shape)
    if (found := (shapes.get(update.a), shapes.get(update.b))) != expected:
        raise RequestError(f"{folder}: adapter and base do not match: {name} has matrices {found}, not {expected}")
    return update


def stored_experts(
    base_files: BaseFiles, model: Any, updates: Mapping[str, ExpertLora], as_trained: bool
) -> dict[str, StoredExperts]:
    """Return the tensors of fused experts that a merge has to change: stored name -> what it holds.

    Args:
        base_files: the base's files.
        model: the base on the meta device.
        updates: name of a parameter -> its update.
        as_trained: whether experts without an update change too, because they are quantized in training.

    Raises:
        RequestError: transformers computes such a parameter from the files in a way that is not understood here.
    """
    from orchestrator.experts import expert_matrices, num_parts

    wanted = {name: weight for name, weight in expert_matrices(model).items() if as_trained or name in updates}
    found: dict[str, StoredExperts] = {}
    for stored, (name, expert, part) in _expert_parts(model, base_files.files).items():
        if name in wanted:
            module = model.get_submodule(name.rpartition(".")[0])
            parts = num_parts(module, name.rpartition(".")[2])
            whole = StoredExperts(name, module.num_experts, module.is_transposed, parts, update=updates.get(name))
            if expert is None or not module.is_transposed:  # no family stores transposed experts one by one
                found[stored] = replace(whole, expert=expert, part=part)
    for name in wanted:
        parts_of = [each for each in found.values() if each.parameter == name]
        if sum(1 if each.expert is None else 1 / each.num_parts / each.num_experts for each in parts_of) < 0.99:
            onto = "" if name in updates else "Merge onto the original weights (`--onto original`), or export"
            raise RequestError(
                f"base.model {base_files.base.model}: its files contain {name} in a form that cannot be merged",
                f"{onto or 'Export'} it as an adapter (`--format adapter`).",
            )
    return found


def _expert_parts(model: Any, stored: Iterable[str]) -> dict[str, tuple[str, int | None, int]]:
    """Find the stored weights of fused experts.

    Args:
        model: a model; it may be on the meta device.
        stored: names in the model's files.

    Returns:
        For each name: the parameter, the number of the expert, and the number of its matrix among those that are
        joined one below the other (gate and up). The expert is None for a weight that is the whole parameter.

    transformers 5.23: files of most families hold each expert by itself; `WeightConverter` stacks them while they load.
    """
    found: dict[str, tuple[str, int | None, int]] = {}
    for name, renamed, pattern, converter in renamed_weights(model, stored):
        number = re.search(r"\.experts\.(\d+)\.", name)
        if converter is None:
            found[name] = renamed, None, 0
        elif number and [(type(each).__name__, getattr(each, "dim", None)) for each in converter.operations] in (
            [("MergeModulelist", 0)],
            [("MergeModulelist", 0), ("Concatenate", 1)],
        ):
            found[name] = renamed, int(number[1]), converter.source_patterns.index(pattern)
    return found
