"""A base as its configuration tells it: a layer without its weights, enough to compile the kernels of its trials.

    python -m orchestrator.training.fast.warmup.precompile_worker SLOTS < JSON of a list of trials' configurations

Neither transformers' models nor bitsandbytes are imported: they take longer than most kernels.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from filelock import FileLock, Timeout
from torch import nn
from torch.overrides import TorchFunctionMode

from orchestrator.base import config_file
from orchestrator.errors import TrialError
from orchestrator.spec import TrialConfig
from orchestrator.training.fast.plan.eligibility import unsupported_reason_by_shape
from orchestrator.training.fast.plan.factory import LONGEST_STEP, compile_kernels
from orchestrator.training.fast.plan.memory import BaseShape
from orchestrator.training.fast.step.decoder import GROUPS, MODEL_TYPES
from orchestrator.training.model.targets import expected_modules

_DONE = "done"


def skeleton(config: Any, dtype: torch.dtype) -> Any:
    """A Llama-like base of one layer: its modules by their names in transformers, its weights not set.

    It lies on the CPU, for many an operation on the meta device imports torch's compiler: seconds.

    Args:
        config: with the fields that `BaseShape.of` reads.
        dtype: of the weights.
    """
    shape = BaseShape.of(config)
    with torch.device("meta"):  # where nothing is drawn
        linears = {name: nn.Linear(*sizes, bias=False, dtype=dtype) for name, sizes in shape.linears.items()}
        parts: dict[str, dict[str, nn.Module]] = {"self_attn": {}, "mlp": {}}
        for name, linear in linears.items():
            parts["self_attn" if name in (*GROUPS[0], *GROUPS[1]) else "mlp"][name] = linear
        norms = {
            name: nn.RMSNorm(shape.hidden, dtype=dtype) for name in ("input_layernorm", "post_attention_layernorm")
        }
        layer = nn.ModuleDict({name: nn.ModuleDict(modules) for name, modules in parts.items()} | norms)
        embedding = nn.Embedding.from_pretrained(torch.empty(shape.vocabulary, shape.hidden, dtype=dtype))
        norm = nn.RMSNorm(shape.hidden, dtype=dtype)
        head = nn.Linear(shape.hidden, shape.vocabulary, bias=False, dtype=dtype)
    inner = nn.ModuleDict({"embed_tokens": embedding, "layers": nn.ModuleList([layer]), "norm": norm})
    inner.rotary_emb = lambda states, positions: [states.new_empty(*positions.shape, shape.head_size)] * 2
    base = nn.ModuleDict({"model": inner, "lm_head": head}).to_empty(device="cpu")
    base.config = config
    base.get_input_embeddings = lambda: embedding
    base.get_output_embeddings = lambda: head
    return base


class _NoProducts(TorchFunctionMode):  # type: ignore[misc]  # mypy skips torch
    """Matrix products have their shape and no values: on a CPU those of a large base take longer than the compiler."""

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if function is nn.functional.linear:
            return arguments[0].new_empty(len(arguments[0]), len(arguments[1]))
        if function is torch.Tensor.__matmul__:
            return arguments[0].new_empty(len(arguments[0]), arguments[1].shape[1])
        if function is torch.mm:
            return options["out"]
        return function(*arguments, **(options or {}))


def compile_for(configs: Sequence[TrialConfig], num_slots: int) -> None:
    """Fill Triton's cache for such trials; nothing where the engine does not hold them on a GPU.

    Args:
        configs: trials on one base, as far as their own fields say that the fast engine holds them.
        num_slots: trials at a time.
    """
    base, file = configs[0].base, config_file(configs[0].base)
    if file is None:
        return
    known = {"head_dim": None, "tie_word_embeddings": False} | json.loads(file.read_text(encoding="utf-8"))
    known["num_key_value_heads"] = known.get("num_key_value_heads") or known["num_attention_heads"]
    if known["model_type"] not in MODEL_TYPES:
        return
    layer = skeleton(SimpleNamespace(**known), getattr(torch, base.compute_dtype))
    held, shape = [], BaseShape.of(layer.config)
    with suppress(TrialError):  # such as targets in other layers than the first
        for config in configs:
            in_it = config.model_copy(update={"lora": config.lora.model_copy(update={"layers_to_transform": None})})
            modules = expected_modules(layer, in_it.lora)
            if unsupported_reason_by_shape(in_it, shape, modules, LONGEST_STEP, on_gpu=True) is None:
                held.append(in_it)
        if held:
            with _NoProducts():
                compile_kernels(layer, held, num_slots)


def once(task: str, do: Callable[[], None]) -> None:
    """Of the processes of a machine that have the same task for Triton's cache, one does it, and the others wait."""
    folder, name = Path(triton.knobs.cache.dir), hashlib.sha256(task.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"orchestrator-{name}.lock"
    lock = FileLock(file, fallback_to_soft=False)
    try:
        with suppress(OSError):  # on storage without locks all do it
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
    asked = sys.stdin.read()
    configs = [TrialConfig.model_validate(each) for each in json.loads(asked)]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    once(f"{device} {sys.argv[1]} {asked}", lambda: compile_for(configs, int(sys.argv[1])))
