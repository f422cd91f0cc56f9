"""Compiles the kernels of trials from their base's configuration alone, with a model of few layers without weights.

    python -m orchestrator.training.fast.warmup.precompile_worker NUM_SLOTS < configs.json

`configs.json` is the JSON of a list of trial configurations. Neither transformers' models nor bitsandbytes are
imported: they take longer than most kernels.
"""

import hashlib
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from filelock import FileLock, Timeout
from torch import nn
from torch.overrides import TorchFunctionMode

from orchestrator.base_folder import text_document
from orchestrator.errors import TrialError
from orchestrator.spec import TrialConfig
from orchestrator.training.fast.families import FAMILIES
from orchestrator.training.fast.families.base_shape import BaseShape
from orchestrator.training.fast.families.family import ExpertNames, Family
from orchestrator.training.fast.families.settings import LAYER_TYPES, layer_kinds, rope_parameters
from orchestrator.training.fast.plan.eligibility import unsupported_reason_by_shape
from orchestrator.training.fast.plan.factory import compile_kernels
from orchestrator.training.fast.sizes import LONGEST_STEP
from orchestrator.training.model.patterns import largest_rank
from orchestrator.training.model.targets import adapted_names

_DONE = "done"

_NEEDED = {
    "hidden_size",
    "num_attention_heads",
    "num_hidden_layers",
    "rms_norm_eps",
    "vocab_size",
}
"""Fields without which nothing is compiled ahead. Files of multimodal bases leave out those with default values."""


def small_base(config: Any, dtype: torch.dtype) -> Any:
    """Build a base with one layer of each kind, with module names as in transformers and uninitialized weights.

    It is on the CPU: many operations on the meta device import torch's compiler, which takes seconds.

    Args:
        config: of a supported family, with the fields that `Settings` and `BaseShape` read. Its fields of layers are
            cut to those of the base.
        dtype: dtype of the weights.
    """
    shape, family, kinds = BaseShape.of(config), FAMILIES[config.model_type], layer_kinds(config)
    chosen = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    config.num_hidden_layers = len(chosen)
    for name in ("layer_types", "no_rope_layers"):
        if values := getattr(config, name, None):
            setattr(config, name, [values[index] for index in chosen])
    with torch.device("meta"):  # no random initialization
        layers = nn.ModuleList([_layer(shape, family, dtype) for _ in chosen])
        embedding = nn.Embedding.from_pretrained(torch.empty(shape.vocabulary, shape.hidden, dtype=dtype))
        norm = nn.RMSNorm(shape.hidden, dtype=dtype)
        head = nn.Linear(shape.hidden, shape.vocabulary, bias=False, dtype=dtype)
    inner = nn.ModuleDict({"embed_tokens": embedding, "layers": layers, "norm": norm})
    share = (
        rope_parameters(config)[0].get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1
    )
    rotary_size = int(shape.head_size * share) // (2 if family.has_half_tables else 1)
    angles = torch.float32 if family.has_float32_angles else dtype
    # Without positions it is not called.
    inner.rotary_emb = lambda _, positions, *__: [torch.empty(*positions.shape, rotary_size, dtype=angles)] * 2
    base = nn.ModuleDict({"model": inner, "lm_head": head}).to_empty(device="cpu")
    base.config = config
    base.get_input_embeddings = lambda: embedding
    base.get_output_embeddings = lambda: head
    return base


def _layer(shape: BaseShape, family: Family, dtype: torch.dtype) -> nn.Module:
    """Build a decoder layer of a family."""
    layer = nn.ModuleDict()
    modules: dict[str, nn.Module] = {
        name: nn.Linear(*shape.linears[leaf], bias=False, dtype=dtype)
        for group in family.groups
        for name in group
        if (leaf := name.rpartition(".")[2]) in shape.linears
    }
    if family.experts is not None:
        modules |= _experts(shape, family.experts, dtype)
    norms = filter(None, vars(family.norms).values())
    modules |= {name: nn.RMSNorm(shape.hidden, dtype=dtype) for name in norms}
    if family.qk_norms is not None:
        heads = shape.queries, shape.keys
        modules |= {
            name: nn.RMSNorm(shape.head_size * (count if family.normalizes_all_heads else 1), dtype=dtype)
            for name, count in zip(family.qk_norms, heads, strict=True)
        }
    for name, module in modules.items():
        parent, _, leaf = name.rpartition(".")
        if parent and parent not in layer:
            layer[parent] = nn.ModuleDict()
        (layer[parent] if parent else layer)[leaf] = module
    if family.sinks is not None:
        parent, _, leaf = family.sinks.rpartition(".")
        layer[parent].register_parameter(leaf, nn.Parameter(torch.empty(shape.queries, dtype=dtype)))
    return layer


def _experts(shape: BaseShape, names: ExpertNames, dtype: torch.dtype) -> dict[str, nn.Module]:
    """Build the router and the experts of a layer, by their names in the layer."""
    gate_up, down = (2 * shape.expert_inner, shape.hidden), (shape.hidden, shape.expert_inner)
    router: dict[str, tuple[int, ...]] = {"weight": (shape.experts, shape.hidden)}
    experts: dict[str, tuple[int, ...]] = {
        name: (shape.experts, *(sizes[::-1] if names.is_transposed else sizes))
        for name, sizes in (("gate_up_proj", gate_up), ("down_proj", down))
    }
    if names.has_biases:
        router["bias"] = (shape.experts,)
        experts |= {"gate_up_proj_bias": (shape.experts, gate_up[0]), "down_proj_bias": (shape.experts, down[0])}
    modules = {}
    for path, parameters in ((names.router, router), (names.experts, experts)):
        modules[path] = nn.Module()
        for name, sizes in parameters.items():
            modules[path].register_parameter(name, nn.Parameter(torch.empty(sizes, dtype=dtype)))
    # By these attributes of transformers' classes, `experts.matrix_names` finds what can be adapted.
    fused: Any = modules[names.experts]
    fused.has_gate, fused.is_transposed, fused.num_experts = True, names.is_transposed, shape.experts
    fused._apply_gate = None
    return modules


class _EmptyProducts(TorchFunctionMode):  # type: ignore[misc]  # mypy skips torch
    """Replaces matrix products by uninitialized tensors: on a CPU, a large base's products outlast the compiler."""

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if function is nn.functional.linear:
            return arguments[0].new_empty(len(arguments[0]), len(arguments[1]))
        # torch 2.13 calls `_grouped_mm` within `grouped_mm`.
        if getattr(function, "__name__", "") in ("grouped_mm", "_grouped_mm"):
            rows, matrices = arguments
            if matrices.ndim == 2:
                return rows.new_empty(len(options["offs"]), len(rows), matrices.shape[1])
            return rows.new_empty(len(rows), matrices.shape[2])
        if function is torch.Tensor.__matmul__:
            return arguments[0].new_empty(len(arguments[0]), arguments[1].shape[1])
        if function is torch.mm:
            return options["out"]
        return function(*arguments, **(options or {}))


def compile_for(configs: Sequence[TrialConfig], num_slots: int) -> None:
    """Fill Triton's cache for trials. Trials that the engine cannot hold on a GPU are skipped.

    The configuration's file is read without transformers, which takes seconds to import. Where it relies on a default
    of transformers, the guessed kernels can be wrong; then the engine compiles the right ones itself.

    Args:
        configs: trials on one base whose own fields allow the fast engine.
        num_slots: trials at a time.
    """
    base = configs[0].base
    fields = {"head_dim": None, "tie_word_embeddings": False} | text_document(base)
    family = FAMILIES.get(fields.get("model_type", ""))
    if family is None or not _has_sizes(fields, family) or _is_refused(fields, family):
        return
    fields["num_key_value_heads"] = fields.get("num_key_value_heads") or fields["num_attention_heads"]
    if "rope_parameters" not in fields:  # files of transformers 4
        fields["rope_parameters"] = {"rope_type": "default"} | (fields.get("rope_scaling") or {})
    base_model = small_base(SimpleNamespace(**fields), getattr(torch, base.compute_dtype))
    eligible, shape = [], BaseShape.of(base_model.config)
    with suppress(TrialError):  # for example targets in layers other than the first
        for config in configs:
            every_layer = config.lora.model_copy(update=_NO_SINGLE_LAYERS)
            names = adapted_names(base_model, every_layer)
            numbers = config.lora.layers_to_transform or range(fields["num_hidden_layers"])
            rank = largest_rank(config.lora, {_in_layer(name, number) for name in names for number in numbers})
            one_layer = config.model_copy(update={"lora": every_layer.model_copy(update={"rank": rank})})
            if unsupported_reason_by_shape(one_layer, shape, names, LONGEST_STEP, on_gpu=True) is None:
                eligible.append(one_layer)
        if eligible:
            with _EmptyProducts():
                compile_kernels(base_model, eligible, num_slots)


_NO_SINGLE_LAYERS: dict[str, Any] = {"layers_to_transform": None, "rank_pattern": {}, "alpha_pattern": {}}
"""Fields of `lora` that may name layers which the small base lacks, and their values without such names."""


def _in_layer(name: str, number: int) -> str:
    """Return the name that a layer of the small base has in the decoder layer of this number."""
    return re.sub(r"\.\d+\.", f".{number}.", name, count=1)


def _has_sizes(fields: Mapping[str, Any], family: Family) -> bool:
    """Return whether a file has the fields that `BaseShape` reads; others have defaults in transformers."""
    needed = {*_NEEDED, family.inner_field} | ({"num_experts_per_tok"} if family.experts is not None else set())
    has_experts = family.experts is None or bool(fields.keys() & {"num_experts", "num_local_experts"})
    return has_experts and fields.keys() >= needed


def _is_refused(fields: Mapping[str, Any], family: Family) -> bool:
    """Return whether the engine will refuse a base for the value of a field in its file, or for a type of layers.

    Files from before transformers 5 say "attention" for "full_attention".
    """
    if not {*(fields.get("layer_types") or ())} <= {"attention", *LAYER_TYPES}:
        return True
    return any(fields.get(name) not in (None, *values) for name, values in family.fixed_fields.items())


def once(task: str, do: Callable[[], None]) -> None:
    """Run a task in one of the machine's processes that start it at the same time; the others wait for that one.

    If the process that runs the task fails, the next one runs it.

    Args:
        task: identifies the task within Triton's cache folder.
        do: fills the cache.
    """
    folder, name = Path(triton.knobs.cache.dir), hashlib.sha256(task.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"orchestrator-{name}.lock"
    lock = FileLock(file, fallback_to_soft=False)
    try:
        with suppress(OSError):  # storage without locks: every process runs it
            try:
                lock.acquire(blocking=False)
            except Timeout:
                lock.acquire()
                if file.read_text() == _DONE:
                    return
        file.write_text("")
        do()
        file.write_text(_DONE)
    finally:
        lock.release()


if __name__ == "__main__":
    request = sys.stdin.read()
    configs = [TrialConfig.model_validate(each) for each in json.loads(request)]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    once(f"{device} {sys.argv[1]} {request}", lambda: compile_for(configs, int(sys.argv[1])))
