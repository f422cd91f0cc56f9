"""Find the linear layers of a base, and those that `all-linear` leaves out: routers, towers, what PEFT refuses.

Almost everything is found from the loaded modules, not from names of families: what a base declares as its routers,
which modules are beside the experts, and which layers a forward pass of text calls.
"""

import inspect
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Any, Literal, cast
from weakref import WeakKeyDictionary

from orchestrator.routers import declared_routers, router_classes, router_layers
from orchestrator.words import counted

LayerShapes = dict[str, tuple[int, int]]
"""Name of a linear layer -> (in_features, out_features)."""

ExpertShapes = dict[str, tuple[int, int, int]]
"""Name of a parameter with a matrix of each expert -> (num_experts, in_features, out_features)."""

Reason = Literal["router", "unreached", "bypassed", "ambiguous", "irregular", "refused"]
"""Why a linear layer is left out:

- router: it decides which experts a token is sent to, or how much a shared expert counts.
- unreached: text does not reach it, such as the layers of a vision tower.
- bypassed: kernels read its weight instead of calling it, so that an adapter may have no effect.
- ambiguous: PEFT takes its name for that of the fused experts.
- irregular: its class computes something other than a linear layer does.
- refused: PEFT does not adapt it in this family.
"""

PEFT_REFUSES: Mapping[str, frozenset[str]] = dict.fromkeys(
    ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"), frozenset({"out_proj"})
)
"""Model type -> last parts of the names of the linear layers that PEFT refuses.

The kernels of these families read the layer's weight instead of calling the layer, so an adapter would not be applied
(peft 0.21, `tuners/tuners_utils.py`, `_check_lora_target_modules_mamba`).
"""

_PHRASES: dict[Reason, str] = {
    "router": "of routers",
    "unreached": "that text never reaches",
    "bypassed": "whose weights kernels read without calling the layer",
    "ambiguous": "that PEFT 0.21 takes by their names for fused experts",
    "irregular": "unlike a linear layer",
    "refused": "that PEFT 0.21 refuses in this family",
}

_MAX_NAMED = 3


@dataclass(frozen=True)
class LinearLayers:
    """The linear layers of a base except its head."""

    shapes: LayerShapes
    left_out: Mapping[str, Reason]
    """Name of a layer in `shapes` that `all-linear` leaves out -> why."""
    impossible: Mapping[str, Reason]
    """Name of a layer that cannot be adapted even if `lora.target_modules` names it -> why."""
    experts: tuple[str, ...]
    """Names of the modules that hold the weights of several experts in one parameter."""
    expert_shapes: ExpertShapes
    """The parameters of such modules that can be adapted."""

    @property
    def adaptable(self) -> LayerShapes:
        """The layers that `all-linear` adapts."""
        return {name: shape for name, shape in self.shapes.items() if name not in self.left_out}

    @property
    def adaptable_leaves(self) -> list[str]:
        """Last parts of the names of layers that can be adapted: a list for `lora.target_modules`."""
        return sorted({last_part(name) for name in self.adaptable} - {last_part(name) for name in self.impossible})

    def say_left_out(self, names: Collection[str], with_experts: bool) -> str | None:
        """Return a warning that says which modules are left out and why; None if there are none.

        Args:
            names: names of layers in `left_out`.
            with_experts: whether to name the fused experts too.
        """
        parts = []
        if self.experts and with_experts:
            parts.append(f"{counted(len(self.experts), 'module')} of fused experts ({_shortened(self.experts)})")
        for reason in _PHRASES:
            if found := [name for name in names if self.left_out[name] == reason]:
                parts.append(self._say(found, reason))
        return f"lora.target_modules: not adapted: {'; '.join(parts)}" if parts else None

    def say_taken(self, names: Collection[str]) -> str | None:
        """Return a warning that layers are adapted which `all-linear` leaves out; None if there are none.

        Args:
            names: names of layers in `left_out` that are adapted.
        """
        found = {reason: [name for name in names if self.left_out[name] == reason] for reason in _PHRASES}
        parts = "; ".join(self._say(each, reason) for reason, each in found.items() if each)
        if not parts:
            return None
        effect = "an adapter on them may have no effect" if found["bypassed"] else "it changes where tokens are sent"
        return f"lora.target_modules: adapts {parts}: {effect}; all-linear leaves them out"

    def _say(self, names: Collection[str], reason: Reason) -> str:
        shown = self._parts_without_others(names) if reason == "unreached" else names
        return f"{counted(len(names), 'layer')} {_PHRASES[reason]} ({_shortened(shown)})"

    def why_impossible(self, names: Collection[str]) -> str:
        """Return a phrase that names layers in `impossible`, and says why they cannot be adapted."""
        found = {why: [name for name in names if self.impossible[name] == why] for why in _PHRASES}
        return "; ".join(self._say(each, why) for why, each in found.items() if each)

    def _parts_without_others(self, names: Collection[str]) -> list[str]:
        """Return the largest parts of the base whose linear layers are all among these, such as a vision tower."""
        others = [name for name in self.shapes if name not in names]
        shared = {"", *(prefix for name in others for prefix in _prefixes(name))}
        return list(dict.fromkeys(next(each for each in _prefixes(name) if each not in shared) for name in names))


_found: WeakKeyDictionary[Any, LinearLayers] = WeakKeyDictionary()
"""Base -> its linear layers, which each trial asks for several times."""


def last_part(name: str) -> str:
    """Return the last part of a module's name."""
    return name.rpartition(".")[2]


def linear_layers(model: Any) -> LinearLayers:
    """Return the linear layers of a bare base.

    The first call for a base may run a forward pass of four tokens. A base without weights cannot run one, so which of
    its layers text does not reach is not known, and none is left out for it.
    """
    if model not in _found:
        _found[model] = _find(model)
    return _found[model]


def _find(model: Any) -> LinearLayers:
    from torch.nn import Linear

    head = model.get_output_embeddings()
    layers = {
        name: module for name, module in model.named_modules() if isinstance(module, Linear) and module is not head
    }
    routers = declared_routers(model)
    experts = _fused_experts(model, routers)
    refused = PEFT_REFUSES.get(getattr(model.config, "model_type", ""), frozenset())
    impossible: dict[str, Reason] = {name: "refused" for name in layers if last_part(name) in refused}
    impossible |= dict.fromkeys(_ambiguous(model, layers) if router_classes(model) else (), "ambiguous")
    impossible |= {name: "irregular" for name, layer in layers.items() if not _is_regular(layer)}
    left_out: dict[str, Reason] = dict.fromkeys(_bypassed(model), "bypassed")
    left_out |= impossible
    if _may_skip_layers(model) and model.device.type != "meta":
        called = _called_by_text(model)
        left_out |= {name: "unreached" for name in layers if _without_expert(name) not in called}
    gates = {*chain.from_iterable(router_layers(routers).values()), *_gates(model, routers)}
    left_out |= {name: "router" for name in layers if name in gates}
    shapes = {name: (layer.in_features, layer.out_features) for name, layer in layers.items()}
    return LinearLayers(shapes, left_out, impossible, tuple(experts), _expert_shapes(model))


def _expert_shapes(model: Any) -> ExpertShapes:
    from orchestrator.experts import PackedExperts, expert_matrices

    shapes = {}
    for name, weight in expert_matrices(model).items():
        shape = weight.ds_shape if isinstance(weight, PackedExperts) else weight.shape
        is_transposed = model.get_submodule(_parent(name)).is_transposed
        shapes[name] = (shape[0], *(shape[1:] if is_transposed else (shape[2], shape[1])))
    return shapes


def _gates(model: Any, routers: Mapping[str, Any]) -> Iterator[str]:
    """Yield linear layers directly beside experts that give one number for each expert, or one for a shared expert."""
    from torch.nn import Linear, ModuleDict, ModuleList

    blocks = {_parent(name) for name in routers}
    for name, module in model.named_modules():
        children = dict(module.named_children())
        gates = {each: child.out_features for each, child in children.items() if isinstance(child, Linear)}
        lists = [len(child) for child in children.values() if isinstance(child, ModuleList | ModuleDict)]
        widths = {width for width in lists if width > 1 and width in gates.values()}
        if name in blocks or widths:
            yield from (_joined(name, each) for each, width in gates.items() if width in {1, *widths})


def _fused_experts(model: Any, routers: Mapping[str, Any]) -> list[str]:
    """Return the modules beside a router that hold matrices as parameters of their own."""
    from torch.nn import Embedding, Linear
    from torch.nn.modules.conv import _ConvNd

    blocks = {_parent(name) for name in routers}
    return [
        name
        for name, module in model.named_modules()
        if not isinstance(module, Embedding | Linear | _ConvNd)
        and any(name.startswith(f"{block}.") for block in blocks)
        and not any(f"{name}.".startswith(f"{router}.") for router in routers)
        and any(parameter.ndim > 1 for parameter in module.parameters(recurse=False))
    ]


def _ambiguous(model: Any, layers: Mapping[str, Any]) -> list[str]:
    """Return layers whose names PEFT turns into parameters of the fused experts, as it does when it loads an adapter.

    For adapters from transformers 4, where experts were linear layers, PEFT 0.21 rewrites names such as `gate_proj` in
    `target_modules`, also those of dense layers and shared experts. PEFT itself is asked for each name.
    """
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    def is_converted(leaf: str) -> bool:
        config = LoraConfig(target_modules=[leaf])
        try:
            convert_peft_config_for_transformers(config, model=model, conversions=None)
        except ValueError:  # it needs the other names of the same parameter
            return True
        return leaf not in cast("set[str]", config.target_modules)

    converted = {leaf for leaf in {last_part(name) for name in layers} if is_converted(leaf)}
    return [name for name in layers if last_part(name) in converted]


def _is_regular(layer: Any) -> bool:
    """Return whether a layer of a class of its own answers as a linear layer does."""
    import torch
    from torch.nn import Linear

    own_code = ("transformers.models.", "transformers_modules.")  # not the classes that hold quantized weights
    if type(layer).forward is Linear.forward or not type(layer).__module__.startswith(own_code):
        return True
    inputs = torch.zeros(1, layer.in_features, dtype=layer.weight.dtype, device=layer.weight.device)
    try:
        with torch.no_grad():
            answer = layer(inputs)
    except (IndexError, RuntimeError):  # it takes inputs of another shape
        return False
    return isinstance(answer, torch.Tensor) and answer.shape == (1, layer.out_features)


def _bypassed(model: Any) -> Iterator[str]:
    """Yield the layers of state-space mixers (Mamba) whose weights the code reads, for kernels or in a product.

    Some of these kernels run on a GPU only. Their layers are left out everywhere, so that an adapter does not depend on
    the device.
    """
    from torch.nn import Linear

    for name, module in model.named_modules():
        if "A_log" not in module._parameters:
            continue
        kind: Any = type(module)
        source = _source_of_forwards(kind)
        for each, child in module.named_children():
            if isinstance(child, Linear) and re.search(rf"self\.{each}\.weight\b(?!\.)", source):
                yield _joined(name, each)


@cache
def _source_of_forwards(module: type) -> str:
    """Return the source code of a class's methods that compute its output. Reading it takes some 10 ms."""
    forwards = [getattr(module, each) for each in dir(module) if "forward" in each]
    return "".join(inspect.getsource(each) for each in forwards if inspect.isfunction(each))


def _may_skip_layers(model: Any) -> bool:
    """Return whether some layers may serve other inputs than text."""
    parts = getattr(model.config, "sub_configs", None)
    return bool(parts) or any("Cross" in type(module).__name__ for module in model.modules())


def _called_by_text(model: Any) -> frozenset[str]:
    """Return the modules that a forward pass of text in training mode calls, by `_without_expert` of their names.

    An expert to which none of the tokens is sent is called if another expert of its layer is.
    """
    import torch

    from orchestrator.base import share_modules

    own, called = share_modules(model), set()
    for name, module in own.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: called.add(_without_expert(name)))
    own.train()
    ids = torch.tensor([_text_ids(model)], device=model.device)
    with torch.random.fork_rng(range(torch.cuda.device_count())), torch.no_grad():
        own(input_ids=ids, use_cache=False)
    return frozenset(called)


def _text_ids(model: Any) -> list[int]:
    """Return four token ids that stand for no image or sound."""
    values = [value for part in (model.config, model.config.get_text_config()) for value in vars(part).items()]
    special = [value for name, value in values if name.endswith(("_token_id", "_token_index"))]
    return [number for number in range(1, 64) if number not in special][:4]


def _without_expert(name: str) -> str:
    """Return a layer's name without numbers after the first one, which is that of the decoder layer."""
    layer, rest = re.match(r"(.*?\.\d+\.)?(.*)", name).groups(default="")  # type: ignore[union-attr]
    return str(layer) + re.sub(r"\d+", "*", rest)


def _shortened(names: Iterable[str]) -> str:
    """Return the distinct names with `*` for numbers inside them, the first of them if there are many."""
    distinct = list(dict.fromkeys(re.sub(r"\.\d+(?=\.)", ".*", name) for name in names))
    more = f" and {len(distinct) - _MAX_NAMED} more" if len(distinct) > _MAX_NAMED else ""
    return ", ".join(distinct[:_MAX_NAMED]) + more


def _prefixes(name: str) -> list[str]:
    """Return the names of the modules that contain a layer, from outside to inside, and its own."""
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _joined(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _parent(name: str) -> str:
    return name.rpartition(".")[0]
