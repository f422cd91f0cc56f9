"""Fused experts: quantized weights, and the forward pass that dequantizes one expert at a time.

transformers 5 keeps the weights of all experts of a layer in one parameter of three dimensions for each projection.
bitsandbytes quantizes linear layers only, so such parameters would stay in 16 bits. Here each becomes a `PackedExperts`
(NF4 or FP4), and the modules that hold them compute with `by_expert`, an implementation that is registered with
transformers (5.23, `integrations/moe.py`).
"""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from torch import Tensor
from torch.nn.functional import linear
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from orchestrator.errors import RequestError

BY_EXPERT = "by_expert"
"""The name of `by_expert` among transformers' implementations of experts."""

_BLOCK, _NESTED_BLOCK = 64, 256
"""Weights that share a scale, and scales that share a scale under double quantization (defaults of bitsandbytes)."""


@dataclass
class ExpertScales:
    """The scales of packed experts: one for each block of 64 weights, which double quantization stores in 8 bits."""

    absmax: Tensor
    """(num_experts, parts, blocks): the scales in float32; under double quantization their 8-bit codes."""
    code: Tensor
    """(16,): the values of the 4-bit codes."""
    nested_absmax: Tensor | None = None
    """(num_experts, parts, ceil(blocks / 256)) in float32: scales of the scales."""
    nested_code: Tensor | None = None
    """(256,): the values of the 8-bit codes."""
    offset: Tensor | None = None
    """(num_experts, parts) in float32: mean of a part's scales, which was subtracted before they were quantized."""

    @classmethod
    def joined(cls, states: Sequence[QuantState], num_parts: int) -> "ExpertScales":
        """Join the scales of the parts of all experts, in the order of the experts."""

        def stacked(tensors: list[Tensor]) -> Tensor:
            return torch.stack(tensors).unflatten(0, (-1, num_parts))

        absmax, first = stacked([state.absmax for state in states]), states[0]
        if not first.nested:
            return cls(absmax, first.code)
        nested = stacked([state.state2.absmax for state in states])
        offset = stacked([torch.as_tensor(state.offset, device=absmax.device) for state in states])
        return cls(absmax, first.code, nested, first.state2.code, offset)

    def of(self, experts: Any) -> Tensor:
        """Return the scales of some experts, in float32.

        Args:
            experts: selects the experts: a slice, or a tensor of their numbers.

        Returns:
            (experts, parts * blocks).
        """
        absmax = self.absmax[experts]
        if self.nested_absmax is not None and self.nested_code is not None and self.offset is not None:
            nested = self.nested_absmax[experts].repeat_interleave(_NESTED_BLOCK, dim=-1)[..., : absmax.shape[-1]]
            absmax = self.nested_code[absmax.int()] * nested + self.offset[experts, ..., None]
        return absmax.flatten(1)

    def on(self, device: torch.device) -> "ExpertScales":
        """Return the scales on a device. A module that moves takes along the codes only."""
        if self.absmax.device == device:
            return self
        return ExpertScales(**{name: each if each is None else each.to(device) for name, each in vars(self).items()})

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(each.nbytes for each in vars(self).values() if each is not None)


class PackedExperts(torch.nn.Parameter):  # type: ignore[misc]
    """One matrix, such as `gate_up_proj`, of all experts of a layer, in NF4 or FP4.

    Its data are the codes, uint8 (num_experts, bytes of one expert). Each expert is quantized by itself as
    bitsandbytes quantizes a linear layer, so that it can be dequantized by itself; gate and up, which the files of most
    families store apart, too. As with `Params4bit`, type and shape of the parameter are those of the codes.
    """

    scales: ExpertScales
    ds_shape: tuple[int, int, int]
    """Shape before quantization. PEFT reads the shape of a parameter here (0.21, `ParamWrapper`), where DeepSpeed keeps
    that of a parameter whose data are elsewhere."""
    num_parts: int
    """Number of matrices of an expert, one below the other, that are quantized separately: 2 for gate and up."""
    is_transposed: bool
    """Whether the shape is (num_experts, in_features, out_features) instead of (num_experts, out_features, ...)."""
    quant_type: str
    compute_dtype: torch.dtype
    """Type of the dequantized weights."""

    @classmethod
    def quantized(
        cls, weight: Tensor, quant_type: str, double_quant: bool, is_transposed: bool = False, num_parts: int = 1
    ) -> "PackedExperts":
        """Quantize the experts of a layer, one after another, on the device where they are.

        Args:
            weight: (num_experts, rows, columns), in the type in which the experts compute.
            quant_type: nf4 or fp4.
            double_quant: also quantize the scales.
            is_transposed: see the attribute.
            num_parts: see the attribute.
        """
        codes, states = [], []
        for matrix in weight.detach().reshape(len(weight) * num_parts, -1):
            values = torch.nn.functional.pad(matrix, (0, -len(matrix) % _BLOCK))  # zeros change no scale
            settings = {"compress_statistics": double_quant, "quant_type": quant_type}
            code, state = quantize_4bit(values, blocksize=_BLOCK, **settings)
            codes.append(code.view(-1))
            states.append(state)
        packed = cls(torch.cat(codes).view(len(weight), -1), requires_grad=False)
        packed.scales = ExpertScales.joined(states, num_parts)
        packed.ds_shape = (weight.shape[0], weight.shape[1], weight.shape[2])
        packed.num_parts, packed.is_transposed = num_parts, is_transposed
        packed.quant_type, packed.compute_dtype = quant_type, weight.dtype
        return packed

    @property
    def double_quant(self) -> bool:
        """Whether the scales are quantized too."""
        return self.scales.offset is not None

    @property
    def num_weights(self) -> int:
        """Number of weights that are packed."""
        return self.ds_shape[0] * self.ds_shape[1] * self.ds_shape[2]

    def dequantized(self, experts: Any = slice(None)) -> Tensor:
        """Dequantize experts, by default all.

        Args:
            experts: selects them: a slice, or a tensor of their numbers.

        Returns:
            (experts, out_features, in_features), a transposed view where the family stores the transpose.
        """
        self.scales = self.scales.on(self.device)
        codes, absmax = self.data[experts].contiguous(), self.scales.of(experts).contiguous()
        state = QuantState(
            absmax.view(-1),
            torch.Size((absmax.numel() * _BLOCK,)),
            self.scales.code,
            _BLOCK,
            self.quant_type,
            self.compute_dtype,
        )
        size = self.ds_shape[1] * self.ds_shape[2] // self.num_parts
        values = dequantize_4bit(codes.view(-1, 1), state).view(len(codes) * self.num_parts, -1)[:, :size]
        weight = values.reshape(len(codes), *self.ds_shape[1:])
        return weight.transpose(1, 2) if self.is_transposed else weight

    def expert(self, number: int) -> Tensor:
        """Dequantize one expert: (out_features, in_features)."""
        return self.dequantized(slice(number, number + 1))[0]

    def __deepcopy__(self, memo: dict[int, Any]) -> "PackedExperts":
        if id(self) not in memo:
            memo[id(self)] = _restored(self.data.clone(), deepcopy(self.__dict__, memo))
        copied: PackedExperts = memo[id(self)]
        return copied

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _restored, (self.data, self.__dict__)


def _restored(codes: Tensor, attributes: dict[str, Any]) -> PackedExperts:
    """Build packed experts from their codes and attributes."""
    packed = PackedExperts(codes, requires_grad=False)
    packed.__dict__.update(attributes)
    return packed


@dataclass(frozen=True)
class ExpertUpdate:
    """The LoRA update of one matrix of all experts: `scale * B A` for each."""

    a: Tensor
    """(num_experts, rank, in_features)."""
    b: Tensor
    """(num_experts, out_features, rank)."""
    scale: float

    def apply(self, inputs: Tensor, counts: Sequence[int]) -> Tensor:
        """Return the update of the outputs.

        Args:
            inputs: (tokens, in_features), sorted by expert.
            counts: number of tokens of each expert.
        """
        a, b = self.a.unbind(0), self.b.unbind(0)  # a slice of each would have a gradient of the whole size
        parts = [linear(linear(rows, a[each]), b[each]) for each, rows in _hit(inputs.to(self.a.dtype), counts)]
        return torch.cat(parts) * self.scale


def per_expert(a: Tensor, b: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Return the matrices of each expert, (experts, rank, in_features) and (experts, out_features, rank).

    Args:
        a: PEFT's A, (experts * rank, in_features), expert by expert.
        b: PEFT's B, (out_features, rank * experts), in which the experts are the last dimension (0.21,
            `ParamWrapper.get_delta_weight`).
        num_experts: number of experts.
    """
    return a.unflatten(0, (num_experts, -1)), b.unflatten(1, (-1, num_experts)).permute(2, 0, 1)


def expert_matrix(weight: Tensor, expert: int, is_transposed: bool) -> Tensor:
    """Return the weight (out_features, in_features) of one expert.

    Args:
        weight: a `PackedExperts`, or a plain parameter of three dimensions.
        expert: number of the expert.
        is_transposed: whether a plain parameter is (num_experts, in_features, out_features).
    """
    if isinstance(weight, PackedExperts):
        return weight.expert(expert)
    return weight[expert].T if is_transposed else weight[expert]


def matrix_names(module: Any) -> list[str]:
    """Return the names of a module's parameters that hold a matrix of each expert; [] for other modules.

    transformers sets these attributes on every class whose experts may be computed by another implementation (5.23,
    `use_experts_implementation`).
    """
    if not all(hasattr(module, name) for name in ("has_gate", "is_transposed", "_apply_gate", "num_experts")):
        return []
    names = ["gate_up_proj" if module.has_gate else "up_proj", "down_proj"]
    found = [module._parameters.get(name) for name in names]
    whole = all(each is not None and (isinstance(each, PackedExperts) or each.ndim == 3) for each in found)
    return names if whole else []


def expert_matrices(model: Any) -> dict[str, Any]:
    """Return the parameters that hold a matrix of each expert, by their full names.

    They are those that `by_expert` can compute; some families have experts of another form.
    """
    return {
        f"{name}.{each}" if name else each: module._parameters[each]
        for name, module in model.named_modules()
        for each in matrix_names(module)
    }


def has_packed_experts(model: Any) -> bool:
    """Return whether any experts of a loaded model are in 4 bits."""
    return any(isinstance(parameter, PackedExperts) for parameter in model.parameters())


def packed(module: Any, name: str, weight: Tensor, quant_type: str, double_quant: bool) -> PackedExperts:
    """Quantize a matrix of all experts.

    Args:
        module: the experts.
        name: the matrix's name in it, from `matrix_names`.
        weight: its values, in the type in which the experts compute.
        quant_type: nf4 or fp4.
        double_quant: also quantize the scales.
    """
    return PackedExperts.quantized(weight, quant_type, double_quant, module.is_transposed, num_parts(module, name))


def num_parts(module: Any, name: str) -> int:
    """Return how many matrices of an expert, one below the other, are quantized separately: 2 for gate and up.

    Args:
        module: the experts.
        name: the parameter's name in it, from `matrix_names`.
    """
    return 2 if name == "gate_up_proj" and module.is_concatenated and not module.is_transposed else 1


def pack_experts(model: Any, quant_type: str, double_quant: bool, compute_dtype: torch.dtype) -> None:
    """Quantize the fused experts of a loaded model, one matrix after another, and have them computed by `by_expert`.

    Args:
        model: it is changed. Experts that are packed already stay as they are.
        quant_type: nf4 or fp4.
        double_quant: also quantize the scales.
        compute_dtype: type of the dequantized weights.
    """
    for module in model.modules():
        for name in matrix_names(module):
            weight = module._parameters[name]
            if not isinstance(weight, PackedExperts):
                plain = weight.detach().to(compute_dtype)
                setattr(module, name, packed(module, name, plain, quant_type, double_quant))
    if has_packed_experts(model):
        compute_by_expert(model)


def compute_by_expert(model: Any) -> None:
    """Have the fused experts of a model computed by `by_expert`.

    Args:
        model: a model of transformers, without an adapter. Its configuration is changed.

    Raises:
        RequestError: its class takes no other implementation.
    """
    if BY_EXPERT not in ALL_EXPERTS_FUNCTIONS.valid_keys():
        ALL_EXPERTS_FUNCTIONS.register(BY_EXPERT, by_expert)
    model.set_experts_implementation(BY_EXPERT)
    for module in model.modules():
        if matrix_names(module) and module.config._experts_implementation != BY_EXPERT:
            raise RequestError(
                f"base.quantization: the experts of {type(model).__name__} cannot be computed from 4-bit weights, nor "
                "adapted: its class takes no other implementation of experts",
                "Set base.quantization: int8 or none, and leave the experts out of lora.target_modules.",
            )


def by_expert(module: Any, hidden: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
    """Compute a layer of experts; at most one expert's matrix is dequantized at a time.

    It computes what transformers' `grouped_mm_experts_forward` computes (5.23). Dequantized weights are not kept for
    the backward pass, which dequantizes them again.

    Args:
        module: the experts. Adapted ones have an `ExpertUpdate` for each adapted matrix in their attribute `updates`.
        hidden: (tokens, features).
        chosen: (tokens, experts per token): numbers of the experts.
        gates: (tokens, experts per token): weights of the experts' outputs.

    Returns:
        (tokens, features).
    """
    num_tokens, num_chosen = chosen.shape
    experts, order = torch.sort(chosen.reshape(-1))
    counts = torch.bincount(experts, minlength=module.num_experts).tolist()
    first, second = matrix_names(module)
    outputs = _product(module, first, hidden[order // num_chosen], experts, counts)
    outputs = module._apply_gate(outputs) if module.has_gate else module.act_fn(outputs)
    outputs = _product(module, second, outputs, experts, counts)
    if module.has_post_expert_norm:
        outputs = module.post_expert_norm(outputs)
    outputs = outputs * gates.reshape(-1)[order, None]
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return outputs[back].view(num_tokens, num_chosen, -1).sum(1).to(hidden.dtype)


def _product(module: Any, name: str, inputs: Tensor, experts: Tensor, counts: Sequence[int]) -> Tensor:
    """Multiply the inputs of each expert by its matrix, and add its bias and its adapter's update."""
    weight = module._parameters[name]
    dtype = weight.compute_dtype if isinstance(weight, PackedExperts) else weight.dtype
    outputs = _Product.apply(inputs.to(dtype), weight, module.is_transposed, counts)
    if module.has_bias:
        outputs = outputs + module._parameters[f"{name}_bias"][experts]
    update = vars(module).get("updates", {}).get(name)
    return outputs if update is None else outputs + update.apply(inputs, counts).to(outputs.dtype)


def _hit(inputs: Tensor, counts: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    """Yield the experts that have tokens, with their inputs."""
    for expert, rows in enumerate(inputs.split(list(counts))):
        if len(rows):
            yield expert, rows


class _Product(torch.autograd.Function):  # type: ignore[misc]
    """Products of sorted inputs with the frozen matrices of their experts."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, is_transposed: bool, counts: Sequence[int]) -> Tensor:
        if weight.requires_grad:
            raise NotImplementedError("by_expert computes frozen experts, and these train")
        ctx.weight, ctx.is_transposed, ctx.counts, ctx.dtype = weight, is_transposed, counts, inputs.dtype
        parts = [linear(rows, expert_matrix(weight, each, is_transposed)) for each, rows in _hit(inputs, counts)]
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = gradients
        parts = [
            rows @ expert_matrix(ctx.weight, each, ctx.is_transposed).to(rows.dtype)
            for each, rows in _hit(gradient, ctx.counts)
        ]
        return torch.cat(parts).to(ctx.dtype), None, None, None
