"""A base in pieces: this process keeps its rank's piece of each decoder layer, and gathers whole layers for a pass.

Only the packed weights and scales of linear layers are cut. Embeddings, LM head, norms, biases and what belongs to a
trial stay whole in each process.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from orchestrator.base import empty_model
from orchestrator.base_size import BaseSize
from orchestrator.errors import RequestError
from orchestrator.spec.sections import BaseSection
from orchestrator.training.fast.families.text_model import find_text_model
from orchestrator.training.fast.shard.gatherer import Gatherer, Shard
from orchestrator.training.fast.shard.group import Group
from orchestrator.training.fast.shard.layout import LayerLayout
from orchestrator.training.fast.shard.place import Place

LARGEST_SHARE = 0.8
"""Share of a GPU's free memory that a base may take while it is loaded and cut there."""

Stored = tuple[torch.Tensor, Any]
"""A weight as it is stored, and its `QuantState` of bitsandbytes, or None where it is not quantized."""


class _Member:
    """This process as a member of a group."""

    def __init__(self, group: Group, on_lost: Callable[[], None]) -> None:
        self.group = group
        self.on_lost = on_lost
        self.gatherer: Gatherer | None = None


_member: _Member | None = None

_sharded: WeakKeyDictionary[Any, "ShardedBase"] = WeakKeyDictionary()
"""Base -> its pieces."""

_weights: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Parameter of a sharded base -> its `_ShardedWeight`."""


@dataclass(frozen=True)
class _ShardedWeight:
    """A linear layer's weight within the buffers of the gatherer."""

    layer: int
    gatherer: Gatherer
    by_buffer: tuple[Stored, Stored]

    def stored(self) -> Stored:
        current = self.gatherer.current
        if current is None or current[0] != self.layer:
            raise RuntimeError(f"decoder layer {self.layer} of a base in pieces is read outside its part of a pass")
        return self.by_buffer[current[1]]


class ShardedBase:
    """The pieces of one base."""

    def __init__(self, gatherer: Gatherer, num_bytes: int) -> None:
        self.gatherer = gatherer
        self.num_bytes = num_bytes
        """Bytes that the base takes in this process: pieces, buffers, and what is not cut."""

    @contextmanager
    def passing(self, trains: bool) -> Iterator[Callable[[int], None]]:
        """Make a pass; see `Gatherer.passing`."""
        with self.gatherer.passing(trains) as visit:
            yield visit


def join_group(place: Place, on_gpu: bool, on_lost: Callable[[], None]) -> None:
    """Make this process a member of a group, for its whole life: bases that it loads are cut into pieces.

    Args:
        place: of this process.
        on_gpu: whether bases lie on this process's GPU.
        on_lost: called when a process of the group has ended; from a thread.

    Raises:
        GroupLost: the others have not come in time.
    """
    global _member
    _member = _Member(Group(place, on_gpu), on_lost)


def loading_place(base: BaseSection) -> Any:
    """Return where to load a base that is cut afterwards: transformers' `device_map`, or None for the usual place.

    A base that does not fit into the memory of one GPU is loaded, and quantized, on the host.
    """
    if _member is None or _member.group.device.type == "cpu":
        return None
    model, memory = empty_model(base), torch.cuda.mem_get_info()[0]
    fits = model is None or BaseSize.foreseen(base, model).num_bytes < LARGEST_SHARE * memory
    return None if fits else {"": "cpu"}


def sharded(base: Any) -> ShardedBase | None:
    """Return the pieces of a base; None where it is whole."""
    return _sharded.get(base)


def shard(base: Any) -> Any:
    """Cut a loaded base into pieces and keep this rank's, if the process is in a group; return the same base.

    Its parameters keep their shapes, but hold no weights any more.

    Args:
        base: as loaded; whole, or cut already.

    Raises:
        RequestError: it cannot be cut.
    """
    if _member is None or base in _sharded:
        return base
    text = find_text_model(base)
    if text is None or "experts" in {name.rpartition(".")[2] for name, _ in text.module.named_modules()}:
        raise RequestError(
            "resources.strategy shard: the fast engine cannot gather the layers of this base, which has experts or an "
            "unknown structure",
            "Set resources.strategy to pipeline.",
        )
    before, group = BaseSize.of(base).num_bytes, _member.group
    linears = [_linears(layer) for layer in text.module.layers]
    tensors = [[tensor for each in layer for tensor in _tensors(each.weight)] for layer in linears]
    layouts = [LayerLayout(each, group.num_ranks) for each in tensors]
    shards = []
    for layer, layout, parts in zip(linears, layouts, tensors, strict=True):
        shards.append(Shard(layout.shard(parts, group.rank).to(group.device), layout.num_bytes))
        parts.clear()
        for linear in layer:
            _empty(linear.weight, group.device)
    _move(base, group.device)
    if _member.gatherer is None:
        _member.gatherer = Gatherer(group, shards, _member.on_lost)
    gatherer = _member.gatherer
    gatherer.shards = shards  # a base that a trial has changed is loaded anew, with equal pieces
    for index, (layer, layout) in enumerate(zip(linears, layouts, strict=True)):
        views = [layout.views(buffer) for buffer in gatherer.buffers]
        for linear in layer:
            first, second = (_stored(linear.weight, each) for each in views)
            _weights[linear.weight] = _ShardedWeight(index, gatherer, (first, second))
    cut = sum(layout.num_bytes - layout.shard_bytes for layout in layouts)
    _sharded[base] = ShardedBase(gatherer, before - cut + sum(buffer.nbytes for buffer in gatherer.buffers))
    return base


def stored(parameter: Any) -> Stored:
    """Return the weight of a linear layer as it is stored; of a base in pieces, from the layer that is gathered now."""
    found = _weights.get(parameter)
    return (parameter.detach(), getattr(parameter, "quant_state", None)) if found is None else found.stored()


def whole_layers(base: Any, count: int) -> list[dict[str, Stored]]:
    """Gather the first decoder layers of a base in pieces, and copy them.

    Returns:
        For each layer the copies of its weights, by the names of its linear layers.
    """
    pieces, text = _sharded[base], find_text_model(base)
    assert text is not None
    copies = []
    with pieces.passing(trains=False) as visit:
        for index, layer in enumerate(text.module.layers):
            visit(index)
            if index < count:
                copies.append(
                    {
                        name: _copied(stored(module.weight))
                        for name, module in layer.named_modules()
                        if isinstance(module, torch.nn.Linear)
                    }
                )
    return copies


def _linears(layer: Any) -> list[Any]:
    return [module for module in layer.modules() if isinstance(module, torch.nn.Linear)]


def _tensors(parameter: Any) -> list[torch.Tensor]:
    """Return what of a weight is cut: its numbers, its scales, and the scales of these."""
    found, state = [parameter.detach()], getattr(parameter, "quant_state", None)
    if state is not None:
        found.append(state.absmax)
        if state.nested:
            found.append(state.state2.absmax)
    return found


def _empty(parameter: Any, device: torch.device) -> None:
    """Free a weight. What is left has its shape, takes no memory, and is on the device."""
    state = getattr(parameter, "quant_state", None)
    parameter.data = _hollow(parameter.detach(), device)
    while state is not None:  # the scales, and the scales of these
        state.absmax = _hollow(state.absmax, device)
        state.code = state.code.to(device)
        if state.offset is not None:
            state.offset = state.offset.to(device)
        state = state.state2


def _hollow(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.zeros(1, dtype=tensor.dtype, device=device).expand(tensor.shape)


def _move(base: Any, device: torch.device) -> None:
    """Move what is not cut to the device: a base that is too large for one GPU has been loaded on the host."""
    for tensor in (*base.parameters(), *base.buffers()):
        if tensor.device != device:
            tensor.data = tensor.data.to(device)


def _stored(parameter: Any, views: list[torch.Tensor]) -> Stored:
    """Take a weight's tensors from the front of a layer's views."""
    weight, state = views.pop(0), getattr(parameter, "quant_state", None)
    if state is None:
        return weight, None
    state = copy.copy(state)
    state.absmax = views.pop(0)
    if state.nested:
        state.state2 = copy.copy(state.state2)
        state.state2.absmax = views.pop(0)
    return weight, state


def _copied(weight: Stored) -> Stored:
    return weight[0].clone(), copy.deepcopy(weight[1])
