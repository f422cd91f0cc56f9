"""An adapter and its base as one model, written weight by weight: neither is ever in memory as a whole."""

import json
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from orchestrator.adapters.bundle import WEIGHTS
from orchestrator.adapters.stops import as_eos, write_stops
from orchestrator.deploy.adapter_ref import AdapterRef
from orchestrator.deploy.chat import PromptForm, question_template
from orchestrator.deploy.export.base_files import BaseFiles, find_base_files
from orchestrator.deploy.export.memory_limit import why_out_of_memory
from orchestrator.deploy.load import load_own_tokenizer, stop_tokens
from orchestrator.errors import RecordError, RequestError
from orchestrator.spec.sections import BaseSection

Dtype = Literal["bf16", "fp16"]
Onto = Literal["dequantised", "original"]

DTYPES: dict[Dtype, str] = {"bf16": "bfloat16", "fp16": "float16"}
SHARD_BYTES = 512 << 20
"""Of one file of the merged model."""

SHARDS_AT_ONCE = 2
"""Each in a thread, which reads, merges and writes it: copies to and from pages of files are most of the time."""

_PREFIX = "base_model.model."
"""Before every name in PEFT's file."""
_TOKENS = ".token_adapter.trainable_tokens_delta"
"""After the name of a module whose rows train."""


@dataclass(frozen=True)
class LoraUpdate:
    """What LoRA adds to a layer's weight (out, in): `scale * B @ A`, with A (rank, in) and B (out, rank)."""

    a: str
    b: str
    """Names in the adapter's file."""
    scale: float
    magnitude: str | None
    """Name of what DoRA makes the length of each row of the sum (out,); None without."""


@dataclass(frozen=True)
class TrainedRows:
    """Rows of an embedding or a head that trained: (len(ids), width) in the adapter's file."""

    key: str
    """Their name there."""
    ids: list[int]
    """Tokens. Those beyond the stored vocabulary are new."""


@dataclass(frozen=True)
class Merge:
    """A merge that can be made: whatever is wrong with it has been told."""

    subject: AdapterRef
    stored: BaseFiles
    dtype: Dtype
    updates: Mapping[str, LoraUpdate]
    """By weight of the base."""
    replaced: Mapping[str, str]
    """Weight or bias of the base -> name in the adapter's file, of those that were trained themselves."""
    rows: Mapping[str, TrainedRows]
    """By weight of the base."""
    quantised: Mapping[str, Any] | None
    """Weight -> its quantised layer on meta; None for a merge onto the original weights."""
    saved_shapes: Mapping[str, tuple[int, ...]]
    """Of what is `replaced`."""
    embedding: frozenset[str]
    """Weights with a row for each token."""

    @cached_property
    def weights(self) -> Mapping[str, Any]:
        """All weights of the merged model, on meta."""
        import torch

        dtype = getattr(torch, DTYPES[self.dtype])
        empty = {name: self.stored.empty(name, dtype) for name in self.stored.files}
        grown = {name: self.num_tokens(name) for name in (*self.rows, *self.replaced) if empty[name].ndim == 2}
        return empty | {
            name: torch.empty(count, empty[name].shape[1], dtype=dtype, device="meta") for name, count in grown.items()
        }

    def num_tokens(self, name: str) -> int:
        """Rows of a merged weight: those that are stored, and those of new tokens."""
        if rows := self.rows.get(name):
            return max(self.stored.shape(name)[0], max(rows.ids) + 1)
        return self.saved_shapes[name][0]

    @property
    def num_bytes(self) -> int:
        """Of the merged weights."""
        return sum(weight.nbytes for weight in self.weights.values())

    def write(self, target: Path, shard_bytes: int = SHARD_BYTES) -> None:
        """Write the model into a folder that exists: sharded safetensors, configurations, tokenizer, chat template.

        Args:
            target: where to.
            shard_bytes: of one file; a larger weight has a file of its own.
        """
        from huggingface_hub import split_torch_state_dict_into_shards
        from safetensors.torch import save_file

        split = split_torch_state_dict_into_shards(dict(self.weights), max_shard_size=shard_bytes)

        def write_shard(file: str, names: list[str]) -> None:
            save_file({name: self.value(name) for name in names}, target / file, metadata={"format": "pt"})

        with ThreadPoolExecutor(SHARDS_AT_ONCE) as threads:
            list(threads.map(write_shard, split.filename_to_tensors.keys(), split.filename_to_tensors.values()))
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        config = self.stored.config
        config.dtype = DTYPES[self.dtype]
        for name in (*self.rows, *self.replaced):
            if name in self.embedding:
                config.get_text_config().vocab_size = self.num_tokens(name)
        self.stored.copy_rest(target)
        tokenizer = load_own_tokenizer(self.subject)
        if trained := self.subject.config:
            form = PromptForm(tokenizer, trained.data)
            if not form.takes_turns:  # servers know no other way to ask than this template
                tokenizer.chat_template = question_template(form)
        self._write_stops(target, config, tokenizer)
        config.save_pretrained(str(target))
        tokenizer.save_pretrained(str(target))

    @cached_property
    def stop_tokens(self) -> list[int]:
        """Ids at which answers are over."""
        return stop_tokens(self.subject, self.stored.stops)

    def _write_stops(self, target: Path, config: Any, tokenizer: Any) -> None:
        """Write the stop tokens into all that servers read them from: both configurations and the tokenizer.

        Some, such as llama.cpp's converter, know the tokenizer's EOS alone: it becomes the token that ends an answer,
        unless the chat template writes the EOS somewhere, whose text must stay.
        """
        stops = self.stop_tokens
        config.get_text_config().eos_token_id = as_eos(stops)
        write_stops(target, stops, tokenizer)
        if stops and "eos_token" not in str(tokenizer.chat_template):
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(stops[0])

    def value(self, name: str) -> Any:
        """One weight of the merged model, on the CPU: worked out on the GPU if there is one and it has room."""
        import torch

        if torch.cuda.is_available():
            try:
                return self._worked_out(name, "cuda")
            except RuntimeError as error:
                if why_out_of_memory(error) is None:
                    raise
            torch.cuda.empty_cache()
        return self._worked_out(name, "cpu")

    def _worked_out(self, name: str, device: str) -> Any:
        """One weight: summed in float32, rounded once."""
        import torch
        from safetensors import safe_open

        with safe_open(self.subject.adapter / WEIGHTS, "pt") as adapter:
            if name in self.replaced:
                weight = adapter.get_tensor(self.replaced[name]).to(device)
            else:
                weight = self._as_trained(name, self.stored.read(name).to(device))
            if update := self.updates.get(name):
                a, b = (adapter.get_tensor(each).to(device, torch.float32) for each in (update.a, update.b))
                weight = (b @ a).mul_(update.scale).add_(weight)
                if update.magnitude is not None:
                    magnitude = adapter.get_tensor(update.magnitude).to(device, torch.float32)
                    weight = (magnitude / torch.linalg.norm(weight, dim=1))[:, None] * weight
            if rows := self.rows.get(name):
                trained = adapter.get_tensor(rows.key).to(device, torch.float32)
                new = self.num_tokens(name) - len(weight)
                weight = torch.cat([weight.float(), weight.float().mean(0, keepdim=True).expand(new, -1)])
                weight[rows.ids] = trained
        return weight.to("cpu", getattr(torch, DTYPES[self.dtype])) if weight.is_floating_point() else weight.cpu()

    def _as_trained(self, name: str, weight: Any) -> Any:
        """A weight of the base as the adapter met it: cast, and where that was so, quantised and dequantised."""
        import torch
        from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant, int8_vectorwise_quant
        from bitsandbytes.nn import Linear8bitLt, Params4bit

        if self.quantised is None or not weight.is_floating_point():
            return weight
        weight = weight.to(getattr(torch, self.stored.base.compute_dtype))
        if name not in self.quantised:
            return weight
        if isinstance(self.quantised[name], Linear8bitLt):
            held, scales, _ = int8_vectorwise_quant(weight.to(torch.float16))
            return int8_vectorwise_dequant(held, scales)
        form = vars(self.quantised[name].weight) | {"module": None}  # which would keep the scales
        packed = Params4bit(weight, requires_grad=False, **form).to(weight.device)
        return dequantize_4bit(packed.data, packed.quant_state)


def default_dtype(base: BaseSection) -> Dtype:
    """Type of the 16-bit forms of an adapter on this base: that of the base's products, or bf16 for float32."""
    return "fp16" if base.compute_dtype == "float16" else "bf16"


def plan_merge(subject: AdapterRef, dtype: Dtype, onto: Onto) -> Merge:
    """See what goes where; nothing is written, and no weight is read.

    Args:
        subject: the adapter and its base.
        dtype: of the merged model.
        onto: the base as the adapter was trained on it, or its original weights.

    Raises:
        RequestError: the base cannot be found, the adapter does not fit it, or holds what cannot be merged.
    """
    from peft import PeftConfig
    from safetensors import SafetensorError, safe_open

    stored = find_base_files(subject.base)
    try:
        with safe_open(subject.adapter / WEIGHTS, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no dict)
    except SafetensorError as error:
        raise RecordError(f"{subject.adapter / WEIGHTS}: is damaged: {error}") from error
    config = PeftConfig.from_pretrained(str(subject.adapter))
    if config.peft_type != "LORA":
        raise RequestError(f"{subject.adapter}: is an adapter of type {config.peft_type.value}; only LoRA is merged")
    blank = stored.blank()
    tied = {each for pair in (blank.all_tied_weights_keys or {}).items() for each in pair}
    updates = _updates(blank, config, shapes, subject.adapter)
    rows = _rows(config, shapes)
    used = {each for update in updates.values() for each in (update.a, update.b, update.magnitude)}
    used |= {each.key for each in rows.values()}
    replaced = {name.removeprefix(_PREFIX).replace(".base_layer.", "."): name for name in shapes if name not in used}
    embedding = _embedding(blank)
    _require_fit(stored, updates, replaced, rows, shapes, tied, embedding)
    quantised = stored.quantised() if onto == "dequantised" else None
    if unknown := sorted(set(quantised or ()) - stored.files.keys()):
        raise _stored_otherwise(stored, unknown[0])
    saved = {name: shapes[key] for name, key in replaced.items()}
    return Merge(subject, stored, dtype, updates, replaced, rows, quantised, saved, embedding)


def _updates(blank: Any, config: Any, shapes: Mapping[str, tuple[int, ...]], adapter: Path) -> dict[str, LoraUpdate]:
    """Updates by weight. PEFT itself says which layers it adapts, and how it scales them.

    Raises:
        RequestError: it adapts a layer that the base does not have, or in a way that cannot be merged.
    """
    from peft import inject_adapter_in_model
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.variants import DoraLinearVariant
    from torch.nn import Linear

    matrices_alone = replace(config, trainable_token_indices=None)  # whose rows the blank base may not have
    try:
        model = inject_adapter_in_model(matrices_alone, blank, low_cpu_mem_usage=True)
    except ValueError as error:  # none of its target modules is there
        raise RequestError(f"{adapter}: does not fit the base: {error}") from error
    updates = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        told = f"{adapter}: adapts {name}"
        variant = layer.lora_variant.get("default")
        if variant is not None and not isinstance(variant, DoraLinearVariant):
            raise RequestError(f"{told} by {type(variant).__name__}; only plain LoRA and DoRA are merged")
        if type(layer.get_base_layer()) is not Linear:
            raise RequestError(f"{told}, a {type(layer.get_base_layer()).__name__}; only linear layers are merged")
        matrices = f"{_PREFIX}{name}.lora_"
        magnitude = f"{matrices}magnitude_vector" if variant is not None else None
        update = LoraUpdate(f"{matrices}A.weight", f"{matrices}B.weight", layer.scaling["default"], magnitude)
        if not {update.a, update.b, magnitude} - {None} <= shapes.keys():
            raise RequestError(
                f"{adapter}: is for another base: it holds no matrices for {name}, which it would adapt in this one"
            )
        rank, ranks = layer.r["default"], (shapes[update.a][0], shapes[update.b][1])
        if ranks != (rank, rank):
            raise RequestError(f"{adapter}: {name}: rank {rank} by adapter_config.json, but {ranks} in {WEIGHTS}")
        updates[f"{name}.weight"] = update
    return updates


def _rows(config: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, TrainedRows]:
    """Rows of trained tokens by weight, as PEFT names them."""
    asked, found = config.trainable_token_indices or {}, {}
    for key in shapes:
        module = key.removeprefix(_PREFIX).removesuffix(_TOKENS)
        for name in ["embed_tokens"] if isinstance(asked, list) else asked:
            if key.endswith(_TOKENS) and module.endswith(name):
                found[f"{module}.weight"] = TrainedRows(key, asked if isinstance(asked, list) else asked[name])
    return found


def _embedding(blank: Any) -> frozenset[str]:
    """Names of the weights that have a row for each token."""
    ends = {id(blank.get_input_embeddings()), id(blank.get_output_embeddings())}
    return frozenset(f"{name}.weight" for name, module in blank.named_modules() if id(module) in ends)


def _require_fit(
    stored: BaseFiles,
    updates: Mapping[str, LoraUpdate],
    replaced: Mapping[str, str],
    rows: Mapping[str, TrainedRows],
    shapes: Mapping[str, tuple[int, ...]],
    tied: set[str],
    embedding: Collection[str],
) -> None:
    """Every matrix of the adapter must have its place in the base, and its shape."""
    model = stored.base.model
    for key in replaced.values():
        if ".lora_" in key:
            raise RequestError(f"the adapter holds {key}, for which base {model} has no place that can be merged")
    for name in (*updates, *replaced):
        if name in tied:
            raise RequestError(
                f"the adapter changes {name}, which base {model} shares between its embedding and its head",
                "Ship it as an adapter (`--format adapter`).",
            )
    for name in (*updates, *replaced, *rows):
        if name not in stored.files:
            raise _stored_otherwise(stored, name)
    for name, each in rows.items():
        shape, wanted = shapes[each.key], (len(each.ids), *stored.shape(name)[1:])
        if shape != wanted:
            raise RequestError(f"{name}: trained rows of shape {shape}, but those of base {model} have {wanted}")
    for name, update in updates.items():
        shape, wanted = (shapes[update.b][0], shapes[update.a][1]), stored.shape(name)
        if shape != wanted:
            raise RequestError(
                f"{name}: the adapter is for a weight of shape {shape}, but that of base {model} has {wanted}",
                "It was trained on a base of another shape.",
            )
    for name, key in replaced.items():
        grown = name in embedding and bool(stored.base.new_tokens) and shapes[key][1:] == stored.shape(name)[1:]
        if shapes[key] != stored.shape(name) and not grown:
            raise RequestError(
                f"{name}: trained with shape {shapes[key]}, but that of base {model} has {stored.shape(name)}",
                "It was trained on a base of another shape.",
            )


def _stored_otherwise(stored: BaseFiles, name: str) -> RequestError:
    return RequestError(f"base.model {stored.base.model}: {stored.folder} holds no weight by the name of {name}")
