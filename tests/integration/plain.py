"""Load our adapters with transformers and PEFT alone, and make bases that differ from the embedded one."""

import shutil
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft import AutoPeftModelForCausalLM
from peft.utils.integrations import dequantize_module_weight
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from orchestrator.base import load_base
from orchestrator.embedded import BASE_DIR
from orchestrator.experts import PackedExperts
from orchestrator.spec.sections import BaseSection

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
INT8 = {"load_in_8bit": True}


def reloaded_loss(adapter: Path, rows: Any, form: dict[str, Any] | None, dtype: torch.dtype = torch.float32) -> float:
    """Return the loss per token of the rows, by transformers and PEFT alone; `dtype` is that of unquantized weights."""
    return loss_of(reloaded(adapter, form, dtype), rows)


def reloaded(adapter: Path, form: dict[str, Any] | None, dtype: torch.dtype = torch.float32) -> Any:
    """Load an adapter on its base, by transformers and PEFT alone.

    On a CPU with avx512_bf16, bitsandbytes repacks 4-bit weights for evaluation. It then multiplies in bfloat16, and
    PEFT computes DoRA's norms from the packed bytes, which is wrong (peft 0.21.2, bitsandbytes 0.50.2). The repacking
    is turned off here.
    """
    quantized = BitsAndBytesConfig(**form, bnb_4bit_compute_dtype=torch.float32) if form else None
    model = AutoPeftModelForCausalLM.from_pretrained(
        str(adapter), quantization_config=quantized, dtype=dtype, device_map="cpu"
    )
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model


def plain_base(folder: Path, quantization: str) -> Any:
    """Load a base with transformers alone, in float32, with the values that its weights have after quantization."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    base = load_base(BaseSection(model=str(folder), quantization=quantization, compute_dtype="float32"))
    for name, module in base.named_modules():
        if quantization != "none" and isinstance(module, torch.nn.Linear):
            model.get_submodule(name).weight.data.copy_(dequantize_module_weight(module))
    for name, parameter in base.named_parameters():
        if isinstance(parameter, PackedExperts):
            whole = parameter.dequantized()
            model.get_parameter(name).data.copy_(whole.mT if parameter.is_transposed else whole)
    return model.eval()


def loss_of(model: Any, rows: Any) -> float:
    """Return the loss per token of these rows."""
    # All rows in one batch, as the trial evaluates: LLM.int8() picks its outlier columns from all rows of a batch.
    longest = max(len(row["input_ids"]) for row in rows)
    ids, labels = torch.full((len(rows), longest), 3), torch.full((len(rows), longest), -100)
    for i, row in enumerate(rows):
        ids[i, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
        labels[i, : len(row["labels"])] = torch.tensor(row["labels"])
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=(ids != 3).long()).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100).item()


def another_base(folder: Path, **config: Any) -> Path:
    """Save the embedded base with another configuration: with an untied head, or with small biases, or both."""
    shutil.copytree(BASE_DIR, folder)
    asked = AutoConfig.from_pretrained(BASE_DIR, **config)
    model = AutoModelForCausalLM.from_pretrained(BASE_DIR, config=asked, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        if not asked.tie_word_embeddings:
            model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.clone())
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(std=0.02, generator=generator)
    model.save_pretrained(folder)
    return folder
