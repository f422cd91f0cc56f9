"""An export loaded back, as anyone would load it, and held against the adapter: one model in memory at a time.

A merged model may be larger than the GPU on which its base trained in 4 bits. What does not fit lies in memory, or
stays on the disk, and is brought in layer by layer (accelerate's offload).
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from orchestrator.base import device_map, device_name, evict, keep_trainable, quantization_config
from orchestrator.deploy.adapter_ref import AdapterRef
from orchestrator.deploy.export import gguf, ray_serve
from orchestrator.deploy.export.base_files import loaded_bytes
from orchestrator.deploy.export.memory_limit import available_bytes, require_memory, why_out_of_memory
from orchestrator.deploy.export.merge import DTYPES, Dtype, Onto
from orchestrator.deploy.export.parity import Parity, Row, Source, ask, measure_parity
from orchestrator.deploy.load import load_model
from orchestrator.errors import ExportError, RequestError

Format = Literal["adapter", "merged", "gguf", "ray-serve"]

_SHARE = 0.8
"""Of the memory that is free, for weights; the rest is for what a pass works out."""


class NoMemoryError(Exception):
    """One of the two models cannot be loaded, or cannot answer, within the memory there is."""


def hold_against_source(
    folder: Path,
    subject: AdapterRef,
    format: Format,
    dtype: Dtype,
    onto: Onto,
    rows: Sequence[Row],
    say: Callable[[str], None],
) -> Parity:
    """Ask the adapter, then the export: on the GPU if there is one, and where that runs out of memory, on the CPU.

    Args:
        folder: what was exported.
        subject: from what.
        format: of the export.
        dtype: of what was merged.
        onto: which weights it was merged onto.
        rows: what they are asked.
        say: hears of progress.

    Raises:
        NoMemoryError: there is not enough memory for one of them.
        ExportError: the export cannot be loaded.
        RequestError: the adapter cannot be loaded.
    """
    reason = ""
    for on_gpu in [False] if device_name() == "cpu" else [True, False]:
        try:
            say("asking the adapter on its base")
            source = _ask_source(subject, format, onto, dtype, rows, on_gpu)
            evict()
            say("loading the export back")
            return _compare(source, folder, subject, format, dtype, rows, on_gpu)
        except (RuntimeError, MemoryError, RequestError, ExportError) as error:
            if (found := why_out_of_memory(error)) is None:
                raise
            reason = found
        finally:
            evict()
        if on_gpu:
            say(f"the GPU has too little memory, so that both are asked on the CPU: {reason}")
    raise NoMemoryError(reason)


def _ask_source(
    subject: AdapterRef, format: Format, onto: Onto, dtype: Dtype, rows: Sequence[Row], on_gpu: bool
) -> Source:
    """The adapter on the base that the export is to answer like."""
    if onto == "original":
        original = {"quantization": "none", "compute_dtype": DTYPES[dtype]}
        subject = replace(subject, base=subject.base.model_copy(update=original))
    if not on_gpu:
        require_memory(loaded_bytes(subject.base), "the base alone")
    model = load_model(subject, _place(on_gpu))
    if format != "adapter":
        _round_no_inputs(model)
    return ask(model, rows)


def _round_no_inputs(model: Any) -> None:
    """Have 8-bit layers multiply by their dequantised weights, as the merged model does.

    LLM.int8 rounds their inputs to 8 bits as well (arXiv 2208.07339, section 2). That moves logits by 0.5 to 4%, the
    more the wider a model is: more than a scale that is off by 5%, which then would not be seen.
    """
    from bitsandbytes.functional import int8_vectorwise_dequant
    from bitsandbytes.nn import Linear8bitLt
    from torch.nn.functional import linear

    def exact(layer: Any, inputs: tuple[Any, ...], _: Any) -> Any:
        weight = int8_vectorwise_dequant(layer.state.CB, layer.state.SCB).to(inputs[0].dtype)
        return linear(inputs[0].to(weight.device), weight, layer.bias)

    for module in model.modules():
        if isinstance(module, Linear8bitLt):
            module.register_forward_hook(exact)  # after its own forward, which puts its weights into its state


def _compare(
    source: Source, folder: Path, subject: AdapterRef, format: Format, dtype: Dtype, rows: Sequence[Row], on_gpu: bool
) -> Parity:
    """By transformers and PEFT alone."""
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    base = subject.base
    if format == "gguf":
        # transformers reads the file as a whole.
        require_memory((folder / gguf.FILE).stat().st_size, f"the model in {gguf.FILE}")
        return measure_parity(source, gguf.load_gguf(folder, dtype, _place(on_gpu)), rows)
    trust = {"trust_remote_code": base.trust_remote_code}
    try:
        if format != "adapter":
            model = folder / ray_serve.MODEL if format == "ray-serve" else folder
            # For weights that lie in the files otherwise than in the model.
            with tempfile.TemporaryDirectory(dir=folder) as rest:
                spilling = {"device_map": "auto", "max_memory": _room(on_gpu), "offload_folder": rest}
                return measure_parity(
                    source, AutoModelForCausalLM.from_pretrained(str(model), **spilling, **trust), rows
                )
        adapted = AutoPeftModelForCausalLM.from_pretrained(
            str(folder),
            quantization_config=quantization_config(base),
            dtype=getattr(torch, base.compute_dtype),
            device_map=_place(on_gpu),
            **trust,
        )
    except (OSError, ValueError) as error:
        raise ExportError(f"the export cannot be loaded back: {error}", "Nothing was left behind.") from error
    keep_trainable(adapted)  # as the source: bitsandbytes has another arithmetic for inference on some CPUs
    return measure_parity(source, adapted, rows)


def _place(on_gpu: bool) -> Any:
    return device_map() if on_gpu else {"": "cpu"}


def _room(on_gpu: bool) -> dict[int | str, int]:
    """Bytes that weights may take, by device; more of them stay on the disk."""
    from accelerate.utils import get_max_memory

    sizes: dict[int | str, int] = get_max_memory() if on_gpu else {"cpu": 0}
    if "cpu" in sizes:  # accelerate, which knows of no container, leaves it out where a GPU shares its memory
        sizes["cpu"] = available_bytes()
    return {name: int(size * _SHARE) for name, size in sizes.items()}
