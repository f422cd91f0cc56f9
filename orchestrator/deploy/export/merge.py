"""Merge an adapter into its base, weight by weight: neither model is ever in memory as a whole."""

import json
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from orchestrator.adapters.bundle import WEIGHTS
from orchestrator.adapters.stops import as_eos, write_stops
from orchestrator.deploy.adapter_ref import AdapterRef
from orchestrator.deploy.chat import PromptForm, question_template
from orchestrator.deploy.dtypes import DTYPES, Dtype
from orchestrator.deploy.export.base_files import BaseFiles, find_base_files
from orchestrator.deploy.export.expert_weights import (
    ExpertLora,
    StoredExperts,
    expert_update,
    stored_experts,
)
from orchestrator.deploy.export.memory_limit import why_out_of_memory
from orchestrator.deploy.load import load_own_tokenizer, stop_tokens
from orchestrator.errors import RecordError, RequestError

Onto = Literal["dequantized", "original"]
"""Base weights to merge into: those the adapter was trained on, dequantized; or the original ones from the files."""

SHARD_BYTES = 512 << 20
"""Maximum size of one file of the merged model."""

NUM_SHARD_THREADS = 2
"""Threads that each read, merge and write one shard at a time. Most of the time goes into copying file pages."""

_PREFIX = "base_model.model."
"""Prefix of every name in PEFT's file."""
_TOKENS_SUFFIX = ".token_adapter.trainable_tokens_delta"
"""Suffix, in PEFT's file, of a module whose rows were trained."""


@dataclass(frozen=True)
class LoraUpdate:
    """The LoRA update of a layer's weight (out, in): `scale * B @ A`, with A (rank, in) and B (out, rank)."""

    a: str
    b: str
    """Names of the two matrices in the adapter's file."""
    scale: float
    magnitude: str | None
    """Name of DoRA's magnitude vector (out,), the norm of each row of the merged weight; None without DoRA."""


@dataclass(frozen=True)
class TrainedRows:
    """Trained rows of an embedding or a head: a tensor (len(ids), width) in the adapter's file."""

    key: str
    """Name of the tensor."""
    ids: list[int]
    """Token ids of the rows. Ids beyond the base's vocabulary are new tokens."""


@dataclass(frozen=True)
class Merge:
    """A validated plan to merge an adapter into its base; see `plan_merge`."""

    adapter: AdapterRef
    base_files: BaseFiles
    dtype: Dtype
    updates: Mapping[str, LoraUpdate]
    """Name of a weight in the base's files -> its LoRA update; all names here are those in the files."""
    replaced: Mapping[str, str]
    """Name of a fully trained weight or bias of the base -> its name in the adapter's file."""
    trained_rows: Mapping[str, TrainedRows]
    """Name of a base weight -> its trained rows."""
    quantized: Mapping[str, Any] | None
    """Name of a weight -> its quantized layer on the meta device; None for a merge onto the original weights."""
    saved_shapes: Mapping[str, tuple[int, ...]]
    """Shapes of the weights in `replaced`."""
    embedding: frozenset[str]
    """Names of the weights with a row for each token."""
    experts: Mapping[str, StoredExperts]
    """Name of a weight of fused experts that changes -> what it holds."""

    @cached_property
    def weights(self) -> Mapping[str, Any]:
        """All weights of the merged model, on the meta device."""
        import torch

        dtype = getattr(torch, DTYPES[self.dtype])
        empty = {name: self.base_files.meta_weight(name, dtype) for name in self.base_files.files}
        grown = {name: self.num_tokens(name) for name in (*self.trained_rows, *self.replaced) if empty[name].ndim == 2}
        return empty | {
            name: torch.empty(count, empty[name].shape[1], dtype=dtype, device="meta") for name, count in grown.items()
        }

    def num_tokens(self, name: str) -> int:
        """Return the number of rows of a merged weight, including those of new tokens."""
        if rows := self.trained_rows.get(name):
            return max(self.base_files.shape(name)[0], max(rows.ids) + 1)
        return self.saved_shapes[name][0]

    @property
    def num_bytes(self) -> int:
        """Total size of the merged weights."""
        return sum(weight.nbytes for weight in self.weights.values())

    def write(self, target: Path, shard_bytes: int = SHARD_BYTES) -> None:
        """Write the merged model: sharded safetensors, configurations, tokenizer, chat template.

        Args:
            target: an existing folder.
            shard_bytes: maximum size of one file; a larger weight gets its own file.
        """
        from huggingface_hub import split_torch_state_dict_into_shards
        from safetensors.torch import save_file

        split = split_torch_state_dict_into_shards(dict(self.weights), max_shard_size=shard_bytes)

        def write_shard(file: str, names: list[str]) -> None:
            save_file({name: self.value(name) for name in names}, target / file, metadata={"format": "pt"})

        with ThreadPoolExecutor(NUM_SHARD_THREADS) as threads:
            list(threads.map(write_shard, split.filename_to_tensors.keys(), split.filename_to_tensors.values()))
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        config = self.base_files.config
        for each in (config, *(getattr(config, name) for name in config.sub_configs)):
            each.dtype = DTYPES[self.dtype]
        for name in (*self.trained_rows, *self.replaced):
            if name in self.embedding:
                config.get_text_config().vocab_size = self.num_tokens(name)
        self.base_files.copy_rest(target)
        tokenizer = load_own_tokenizer(self.adapter)
        if trained := self.adapter.config:
            form = PromptForm(tokenizer, trained.data)
            if not form.takes_turns:  # servers build prompts only with this template
                tokenizer.chat_template = question_template(form)
        self._write_stops(target, config, tokenizer)
        config.save_pretrained(str(target))
        tokenizer.save_pretrained(str(target))

    @cached_property
    def stop_tokens(self) -> list[int]:
        """Token ids that end an answer."""
        return stop_tokens(self.adapter, self.base_files.stops)

    def _write_stops(self, target: Path, config: Any, tokenizer: Any) -> None:
        """Write the stop tokens everywhere servers read them: both configurations and the tokenizer.

        Some readers, such as llama.cpp's converter, use only the tokenizer's EOS. So the first stop token becomes the
        EOS, unless the chat template refers to `eos_token`: then a new EOS would change the prompts.
        """
        stops = self.stop_tokens
        config.get_text_config().eos_token_id = as_eos(stops)
        write_stops(target, stops, tokenizer)
        if stops and "eos_token" not in str(tokenizer.chat_template):
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(stops[0])

    def value(self, name: str) -> Any:
        """Compute one weight of the merged model, on the GPU if there is one with enough memory. It ends on the CPU."""
        import torch

        if torch.cuda.is_available():
            try:
                return self._compute(name, "cuda")
            except RuntimeError as error:
                if why_out_of_memory(error) is None:
                    raise
            torch.cuda.empty_cache()
        return self._compute(name, "cpu")

    def _compute(self, name: str, device: str) -> Any:
        """Compute one weight: summed in float32, and rounded once."""
        import torch
        from safetensors import safe_open

        with safe_open(self.adapter.folder / WEIGHTS, "pt") as adapter:
            if name in self.replaced:
                weight = adapter.get_tensor(self.replaced[name]).to(device)
            else:
                weight = self._as_trained(name, self.base_files.read(name).to(device))
            if update := self.updates.get(name):
                a, b = (adapter.get_tensor(each).to(device, torch.float32) for each in (update.a, update.b))
                weight = (b @ a).mul_(update.scale).add_(weight)
                if update.magnitude is not None:
                    magnitude = adapter.get_tensor(update.magnitude).to(device, torch.float32)
                    weight = (magnitude / torch.linalg.norm(weight, dim=1))[:, None] * weight
            if name in self.experts and (expert_update := self.experts[name].update):
                a, b = (
                    adapter.get_tensor(each).to(device, torch.float32) for each in (expert_update.a, expert_update.b)
                )
                weight = self.experts[name].delta(a, b, expert_update.scale).add_(weight)
            if rows := self.trained_rows.get(name):
                trained = adapter.get_tensor(rows.key).to(device, torch.float32)
                new = self.num_tokens(name) - len(weight)
                weight = torch.cat([weight.float(), weight.float().mean(0, keepdim=True).expand(new, -1)])
                weight[rows.ids] = trained
        return weight.to("cpu", getattr(torch, DTYPES[self.dtype])) if weight.is_floating_point() else weight.cpu()

    def _as_trained(self, name: str, weight: Any) -> Any:
        """Return a weight of the base as in training: cast, and quantized and dequantized if the base was quantized."""
        import torch
        from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant, int8_vectorwise_quant
        from bitsandbytes.nn import Linear8bitLt, Params4bit

        if self.quantized is None or not weight.is_floating_point():
            return weight
        base = self.base_files.base
        weight = weight.to(getattr(torch, base.compute_dtype))
        if name in self.experts and base.is_4bit:
            return self.experts[name].as_trained(weight, base.quantization, base.double_quant)
        if name not in self.quantized:
            return weight
        if isinstance(self.quantized[name], Linear8bitLt):
            int8, scales, _ = int8_vectorwise_quant(weight.to(torch.float16))
            return int8_vectorwise_dequant(int8, scales)
        settings = vars(self.quantized[name].weight) | {"module": None}  # the module would keep the scales alive
        packed = Params4bit(weight, requires_grad=False, **settings).to(weight.device)
        return dequantize_4bit(packed.data, packed.quant_state)


def plan_merge(adapter: AdapterRef, dtype: Dtype, onto: Onto) -> Merge:
    """Plan a merge and validate it, without reading weights or writing anything.

    Args:
        adapter: the adapter and its base.
        dtype: type of the merged weights.
        onto: base weights to merge into.

    Raises:
        RequestError: the base cannot be found, adapter and base do not match, or the adapter has a part that cannot be
            merged.
        RecordError: the adapter's weights are damaged.
    """
    from peft import PeftConfig
    from safetensors import SafetensorError, safe_open

    base_files = find_base_files(adapter.base)
    try:
        with safe_open(adapter.folder / WEIGHTS, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise RecordError(f"{adapter.folder / WEIGHTS}: is damaged: {error}") from error
    config = PeftConfig.from_pretrained(str(adapter.folder))
    if config.peft_type != "LORA":
        raise RequestError(f"{adapter.folder}: is an adapter of type {config.peft_type.value}; only LoRA can be merged")
    meta_model = base_files.meta_model()
    stored = base_files.stored_names(meta_model)
    tied = {each for pair in (meta_model.all_tied_weights_keys or {}).items() for each in pair}
    updates, expert_updates = _updates(meta_model, config, shapes, adapter.folder)
    experts = stored_experts(
        base_files, base_files.meta_model(), expert_updates, onto == "dequantized" and adapter.base.is_4bit
    )
    trained_rows = _trained_rows(config, shapes)
    used = {each for update in updates.values() for each in (update.a, update.b, update.magnitude)}
    used |= {each for expert in expert_updates.values() for each in (expert.a, expert.b)}
    used |= {each.key for each in trained_rows.values()}
    replaced = {name.removeprefix(_PREFIX).replace(".base_layer.", "."): name for name in shapes if name not in used}
    _require_separate((*updates, *replaced), replaced.values(), tied, adapter.base.model)
    adapted = {*updates}
    updates, replaced, trained_rows = stored.renamed(updates), stored.renamed(replaced), stored.renamed(trained_rows)
    embedding = frozenset(stored.of(name) for name in _embedding(meta_model) if name in stored)
    _require_shapes(base_files, updates, replaced, trained_rows, shapes, embedding)
    quantized = None
    if onto == "dequantized":
        layers = base_files.quantized_layers()
        kept = adapted | base_files.reached_by_text(layers)
        quantized = stored.renamed({name: layer for name, layer in layers.items() if name in kept})
    saved = {name: shapes[key] for name, key in replaced.items()}
    return Merge(adapter, base_files, dtype, updates, replaced, trained_rows, quantized, saved, embedding, experts)


def _updates(
    meta_model: Any, config: Any, shapes: Mapping[str, tuple[int, ...]], folder: Path
) -> tuple[dict[str, LoraUpdate], dict[str, ExpertLora]]:
    """Return the LoRA updates by weight, and those of fused experts by parameter. PEFT itself finds layers and scales.

    Args:
        meta_model: the base on the meta device; PEFT's layers are injected into it.
        config: the adapter's `LoraConfig`.
        shapes: name -> shape of the tensors in the adapter's file.
        folder: the adapter folder, for messages.

    Raises:
        RequestError: the adapter has a layer that the base does not have, or a variant that cannot be merged.
    """
    from peft import inject_adapter_in_model
    from peft.tuners.lora import LoraLayer, ParamWrapper
    from peft.tuners.lora.variants import DoraLinearVariant
    from torch.nn import Linear

    matrices_alone = replace(config, trainable_token_indices=None)  # the base has no rows for new tokens
    try:
        model = inject_adapter_in_model(matrices_alone, meta_model, low_cpu_mem_usage=True)
    except ValueError as error:  # the base has none of the target modules
        raise RequestError(f"{folder}: adapter and base do not match: {error}") from error
    updates, experts = {}, {}
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if isinstance(layer, ParamWrapper):
            parameter = f"{name.replace('.base_layer', '')}.{layer.parameter_name}"
            experts[parameter] = expert_update(name, f"{_PREFIX}{name}.lora_", layer, shapes, folder)
            continue
        adapted = f"{folder}: adapts {name}"
        variant = layer.lora_variant.get("default")
        if variant is not None and not isinstance(variant, DoraLinearVariant):
            raise RequestError(f"{adapted} with {type(variant).__name__}; only plain LoRA and DoRA can be merged")
        if type(layer.get_base_layer()) is not Linear:
            raise RequestError(f"{adapted}, a {type(layer.get_base_layer()).__name__}; only linear layers merge")
        matrices = f"{_PREFIX}{name}.lora_"
        magnitude = f"{matrices}magnitude_vector" if variant is not None else None
        update = LoraUpdate(f"{matrices}A.weight", f"{matrices}B.weight", layer.scaling["default"], magnitude)
        if not {update.a, update.b, magnitude} - {None} <= shapes.keys():
            raise RequestError(
                f"{folder}: adapter and base do not match: the adapter has no matrices for layer {name} of the base"
            )
        rank, ranks = layer.r["default"], (shapes[update.a][0], shapes[update.b][1])
        if ranks != (rank, rank):
            raise RequestError(f"{folder}: {name} has rank {rank} in adapter_config.json, but {ranks} in {WEIGHTS}")
        updates[f"{name}.weight"] = update
    return updates, experts


def _trained_rows(config: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, TrainedRows]:
    """Return the trained rows by weight. PEFT's configuration lists token ids, or module name -> token ids."""
    indices, found = config.trainable_token_indices or {}, {}
    for key in shapes:
        module = key.removeprefix(_PREFIX).removesuffix(_TOKENS_SUFFIX)
        for name in ["embed_tokens"] if isinstance(indices, list) else indices:
            if key.endswith(_TOKENS_SUFFIX) and module.endswith(name):
                found[f"{module}.weight"] = TrainedRows(key, indices if isinstance(indices, list) else indices[name])
    return found


def _embedding(model: Any) -> frozenset[str]:
    """Return the names of the weights that have a row for each token: embedding and head."""
    ends = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    return frozenset(f"{name}.weight" for name, module in model.named_modules() if id(module) in ends)


def _require_separate(changed: Iterable[str], keys: Iterable[str], tied: Collection[str], model: str) -> None:
    """Raise RequestError if a tensor of the adapter belongs to no weight of the base, or to one that is shared.

    Args:
        changed: names of the weights that the adapter changes.
        keys: names in the adapter's file of the tensors that replace weights.
        tied: names of the weights that the base shares between embedding and head.
        model: name of the base, for messages.
    """
    for key in keys:
        if ".lora_" in key:
            raise RequestError(f"adapter and base do not match: {key} belongs to no weight of base {model}")
    for name in changed:
        if name in tied:
            raise RequestError(
                f"{name}: is changed by the adapter, but base {model} shares it between embedding and head",
                "Export it as an adapter (`--format adapter`).",
            )


def _require_shapes(
    base_files: BaseFiles,
    updates: Mapping[str, LoraUpdate],
    replaced: Mapping[str, str],
    trained_rows: Mapping[str, TrainedRows],
    shapes: Mapping[str, tuple[int, ...]],
    embedding: Collection[str],
) -> None:
    """Raise RequestError unless every tensor of the adapter has the shape of its weight in the base's files."""
    model = base_files.base.model
    for name, each in trained_rows.items():
        shape, expected = shapes[each.key], (len(each.ids), *base_files.shape(name)[1:])
        if shape != expected:
            raise RequestError(f"{name}: the trained rows have shape {shape}, but base {model} needs {expected}")
    for name, update in updates.items():
        shape, expected = (shapes[update.b][0], shapes[update.a][1]), base_files.shape(name)
        if shape != expected:
            raise RequestError(
                f"{name}: the adapter is for a weight of shape {shape}, but base {model} has {expected}",
                "The adapter was trained on a base of another shape.",
            )
    for name, key in replaced.items():
        grown = name in embedding and bool(base_files.base.new_tokens) and shapes[key][1:] == base_files.shape(name)[1:]
        if shapes[key] != base_files.shape(name) and not grown:
            raise RequestError(
                f"{name}: was trained with shape {shapes[key]}, but base {model} has {base_files.shape(name)}",
                "The adapter was trained on a base of another shape.",
            )
