"""Check an export: load it as any user would, and compare its answers with the adapter's.

One model is in memory at a time. A merged model may be larger than the GPU on which its base was trained in 4 bits.
Layers that do not fit stay in CPU memory or on disk and are moved in one by one (accelerate's offload).
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, assert_never

from orchestrator.adapters.bundle import Format
from orchestrator.base import configuration, device_map, device_name, evict, load_base, model_class
from orchestrator.base_folder import stored_quantization
from orchestrator.base_weights import keep_trainable, loading_config
from orchestrator.deploy.adapter_ref import AdapterRef
from orchestrator.deploy.dtypes import DTYPES, Dtype
from orchestrator.deploy.export import gguf, ray_serve
from orchestrator.deploy.export.base_files import loaded_bytes
from orchestrator.deploy.export.memory_limit import available_bytes, require_memory, why_out_of_memory
from orchestrator.deploy.export.merge import Onto
from orchestrator.deploy.export.parity import AdapterLogits, EncodedRow, Parity, ask, measure_parity
from orchestrator.deploy.load import load_model
from orchestrator.errors import ExportError, RequestError
from orchestrator.positions import forget_earlier_batches
from orchestrator.spec.sections import BaseSection

_WEIGHTS_SHARE = 0.8
"""Share of the free memory for weights; the rest is for activations."""


class NotEnoughMemoryError(Exception):
    """There is not enough memory to load one of the two models, or to run it."""


def check_parity(
    folder: Path,
    adapter: AdapterRef,
    format: Format,
    dtype: Dtype,
    onto: Onto,
    rows: Sequence[EncodedRow],
    say: Callable[[str], None],
) -> Parity:
    """Run the adapter, then the export, on the same rows and compare their logits.

    Both run on the GPU if there is one; if it runs out of memory, both run on the CPU.

    Args:
        folder: the export.
        adapter: the adapter that was exported.
        format: format of the export.
        dtype: type of the merged weights.
        onto: the base weights it was merged onto.
        rows: rows to run both on.
        say: reports progress.

    Raises:
        NotEnoughMemoryError: there is not enough memory for one of the models.
        ExportError: the export cannot be loaded.
        RequestError: the adapter cannot be loaded.
    """
    reason = ""
    for on_gpu in [False] if device_name() == "cpu" else [True, False]:
        try:
            say("running the adapter on its base")
            source = _run_adapter(adapter, format, onto, dtype, rows, on_gpu)
            evict()
            say("loading the export back")
            return _run_export(source, folder, adapter, format, dtype, rows, on_gpu)
        except (RuntimeError, MemoryError, RequestError, ExportError) as error:
            if (found := why_out_of_memory(error)) is None:
                raise
            reason = found
        finally:
            evict()
        if on_gpu:
            say(f"the GPU has too little memory, so both run on the CPU: {reason}")
    raise NotEnoughMemoryError(reason)


def _run_adapter(
    adapter: AdapterRef, format: Format, onto: Onto, dtype: Dtype, rows: Sequence[EncodedRow], on_gpu: bool
) -> AdapterLogits:
    """Run the adapter on the base weights that the export was made from."""
    if onto == "original":
        original = {"quantization": "none", "compute_dtype": DTYPES[dtype]}
        adapter = replace(adapter, base=adapter.base.model_copy(update=original))
    if not on_gpu:
        require_memory(loaded_bytes(adapter.base), "the base alone")
    model = load_model(adapter, _device_map(on_gpu))
    if format != "adapter":
        _keep_inputs_unquantized(model)
    return ask(model, rows)


def _keep_inputs_unquantized(model: Any) -> None:
    """Make 8-bit layers multiply by their dequantized weights, as the merged model does.

    LLM.int8() also quantizes the inputs to 8 bits (arXiv 2208.07339, section 2). That moves logits by 0.5 to 4%, more
    in wider models. A wrong LoRA scale (off by 5%) moves them less, and would go unnoticed.
    """
    from bitsandbytes.functional import int8_vectorwise_dequant
    from bitsandbytes.nn import Linear8bitLt
    from torch.nn.functional import linear

    def exact(layer: Any, inputs: tuple[Any, ...], _: Any) -> Any:
        weight = int8_vectorwise_dequant(layer.state.CB, layer.state.SCB).to(inputs[0].dtype)
        return linear(inputs[0].to(weight.device), weight, layer.bias)

    for module in model.modules():
        if isinstance(module, Linear8bitLt):
            module.register_forward_hook(exact)  # its own forward fills `layer.state`


def _run_export(
    source: AdapterLogits,
    folder: Path,
    adapter: AdapterRef,
    format: Format,
    dtype: Dtype,
    rows: Sequence[EncodedRow],
    on_gpu: bool,
) -> Parity:
    """Load the export with transformers and PEFT alone, and compare its logits."""
    if format == "gguf":
        # transformers reads the whole file into memory.
        require_memory((folder / gguf.FILE).stat().st_size, f"the model in {gguf.FILE}")
        return measure_parity(source, gguf.load_gguf(folder, dtype, _device_map(on_gpu)), rows)
    try:
        match format:
            case "adapter":
                model = _load_adapter_export(folder, adapter.base, on_gpu)
            case "merged":
                return _run_merged(source, folder, adapter.base, rows, on_gpu)
            case "ray-serve":
                return _run_merged(source, folder / ray_serve.MODEL, adapter.base, rows, on_gpu)
            case _:
                assert_never(format)
    except (OSError, ValueError) as error:
        raise ExportError(f"the export cannot be loaded back: {error}", "Nothing was left behind.") from error
    return measure_parity(source, model, rows)


def _load_adapter_export(folder: Path, base: BaseSection, on_gpu: bool) -> Any:
    import torch
    from peft import AutoPeftModelForCausalLM, PeftModel
    from transformers import AutoModelForCausalLM

    from orchestrator.adapters.expert_updates import apply_by_expert

    if stored_quantization(base) or model_class(configuration(base)) is not AutoModelForCausalLM:
        model = PeftModel.from_pretrained(load_base(base, _device_map(on_gpu)), str(folder))  # PEFT's class cannot
        apply_by_expert(model)
        return model
    model = AutoPeftModelForCausalLM.from_pretrained(
        str(folder),
        quantization_config=loading_config(base),
        dtype=getattr(torch, base.compute_dtype),
        device_map=_device_map(on_gpu),
        trust_remote_code=base.trust_remote_code,
    )
    apply_by_expert(model)
    keep_trainable(model)  # as in `load_base`: on some CPUs, bitsandbytes computes differently for inference
    forget_earlier_batches(model)
    return model


def _run_merged(
    source: AdapterLogits, folder: Path, base: BaseSection, rows: Sequence[EncodedRow], on_gpu: bool
) -> Parity:
    # The offload folder takes weights whose layout in the files differs from that in the model.
    with tempfile.TemporaryDirectory(dir=folder) as offload_folder:
        model = model_class(configuration(base)).from_pretrained(
            str(folder),
            device_map="auto",
            max_memory=_max_memory(on_gpu),
            offload_folder=offload_folder,
            trust_remote_code=base.trust_remote_code,
        )
        forget_earlier_batches(model)  # as in `load_base`
        return measure_parity(source, model, rows)


def _device_map(on_gpu: bool) -> Any:
    return device_map() if on_gpu else {"": "cpu"}


def _max_memory(on_gpu: bool) -> dict[int | str, int]:
    """Return the bytes that weights may take, by device. The remaining weights stay on disk."""
    from accelerate.utils import get_max_memory

    sizes: dict[int | str, int] = get_max_memory() if on_gpu else {"cpu": 0}
    # accelerate ignores a container's limit, and leaves the CPU out if a GPU shares its memory.
    if "cpu" in sizes:
        sizes["cpu"] = available_bytes()
    return {name: int(size * _WEIGHTS_SHARE) for name, size in sizes.items()}
