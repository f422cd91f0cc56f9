"""The README of a bundle: metadata for the hub, and a page for readers."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, assert_never

from orchestrator.base import is_only_multimodal
from orchestrator.base_folder import DEQUANTIZED, hub_id, stored_quantization
from orchestrator.base_weights import plain_layers
from orchestrator.spec import TrialConfig
from orchestrator.spec.sections import BaseSection, DataSection
from orchestrator.spec.sections.evaluation import STDERR

_PAGE = """
# {title}

Step {step} of trial `{trial_id}`, chosen by {metric} ({value:.6g}). LoRA rank {rank}, alpha {alpha:g}, dropout
{dropout:g}, learning rate {learning_rate:g}.

- Base: {base}, loaded with quantization `{quantization}`.
- Prompts: {prompts}.{variants}
- `trial.json` contains the whole configuration, `manifest.json` the sha256 of each file and the package versions.

```python
{load}
```
"""


_MERGED = """
# {title}

The LoRA adapter `{name}`, merged onto the {onto} weights of its base, in {dtype}. {parity}.

- Base: {base}; the adapter was trained on it with quantization `{quantization}`.
- Prompts: {prompts}.
- `manifest.json` contains the whole configuration, the sha256 of each file and the package versions.
"""


def adapter_card(
    config: TrialConfig,
    trial_id: str,
    step: int,
    metric: str,
    values: Mapping[str, float],
    has_packed_experts: bool = False,
) -> str:
    """Write the model card of an adapter.

    Args:
        config: the configuration it was trained with.
        trial_id: its trial.
        step: optimizer step of its weights.
        metric: metric that the step was chosen by.
        values: metrics on the held-out rows at this step, including `metric`.
        has_packed_experts: whether fused experts of its base were in 4 bits.
    """
    title = f"LoRA adapter of trial {trial_id}"
    metadata = card_metadata(config, title, values, library="peft", relation="adapter")
    page = _PAGE.format(
        title=title,
        trial_id=trial_id,
        step=step,
        metric=metric,
        value=values[metric],
        rank=config.lora.rank,
        alpha=config.lora.alpha,
        dropout=config.lora.dropout,
        learning_rate=config.training.learning_rate,
        base=_base(config),
        quantization=config.base.quantization,
        prompts=_prompts(config.data),
        variants="".join(f"\n- {line}." for line in _variants(config, has_packed_experts)),
        load=_load(config.base),
    )
    return f"---\n{metadata.to_yaml()}\n---\n{page}"


def merged_card(config: TrialConfig, name: str, dtype: str, onto: str, parity: str) -> str:
    """Write the model card of a base with an adapter merged into it.

    Args:
        config: the configuration the adapter was trained with.
        name: name of the adapter.
        dtype: type of the merged weights.
        onto: the base weights it was merged onto: `dequantized` or `original`.
        parity: a sentence on how closely its answers match the adapter's.
    """
    title = f"Merged model of {name}"
    metadata = card_metadata(config, title, {}, library="transformers", relation="finetune")
    page = _MERGED.format(
        title=title,
        name=name,
        onto=onto,
        dtype=dtype,
        parity=parity[:1].upper() + parity[1:],
        base=_base(config),
        quantization=config.base.quantization,
        prompts=_prompts(config.data),
    )
    return f"---\n{metadata.to_yaml()}\n---\n{page}"


def card_metadata(config: TrialConfig, name: str, values: Mapping[str, float], library: str, relation: str) -> Any:
    """Build the hub's metadata, a `ModelCardData`.

    It has no license, which is the owner's choice, and no path of this machine.

    Args:
        config: the configuration the adapter was trained with.
        name: name of the model, for its evaluation results.
        values: metrics on the held-out rows; values that are not finite are left out.
        library: library that loads the model.
        relation: relation to the base: `adapter` or `finetune`.
    """
    from huggingface_hub import EvalResult, ModelCardData

    base, data = hub_id(config.base.model), config.data
    scored = data.held_out.sources or data.sources
    of_hub = scored[0] if len(scored) == 1 and not scored[0].is_local else None
    rows = ", ".join(Path(source.source).name if source.is_local else source.source for source in scored)
    hub_ids = list(dict.fromkeys(source.source for source in data.sources if not source.is_local))
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=of_hub.source if of_hub else "local",
            dataset_name=of_hub.source if of_hub else f"held-out rows of {rows}",
            dataset_config=of_hub.config if of_hub else None,
            dataset_split=of_hub.split if of_hub and data.held_out.sources else None,
            metric_type=metric.removeprefix("eval/"),
            metric_name=metric,
            metric_value=value,
        )
        for metric, value in values.items()
        if math.isfinite(value) and not metric.endswith(STDERR)
    ]
    return ModelCardData(
        library_name=library,
        pipeline_tag="text-generation",
        tags=["lora", *(["qlora"] if config.base.is_4bit else []), *(["dora"] if config.lora.dora else [])],
        base_model=base,
        base_model_relation=relation if base else None,
        datasets=hub_ids or None,
        model_name=name,
        eval_results=results or None,
    )


def _base(config: TrialConfig) -> str:
    base = config.base
    if base.model == "embedded":
        return "the small model that ships with the orchestrator, which is not on the hub"
    if hub_id(base.model) is None:
        return f"a local folder, `{Path(base.model).name}`, whose name on the hub is not known"
    return f"`{base.model}`" + (f" at `{base.revision}`" if base.revision else "")


def _variants(config: TrialConfig, has_packed_experts: bool) -> list[str]:
    """Describe how the adapter differs from plain LoRA with the same rank on all layers."""
    lora, tokens = config.lora, config.base.new_tokens
    found = []
    if lora.dora or lora.rslora:
        kinds = [name for name, on in (("DoRA", lora.dora), ("rsLoRA (alpha / sqrt(rank))", lora.rslora)) if on]
        found.append(f"Variant: {' and '.join(kinds)}")
    if lora.rank_pattern or lora.alpha_pattern:
        found.append("Some layers have their own rank or alpha, see `adapter_config.json`")
    if lora.layers_to_transform is not None:
        found.append(f"Adapted layers: {', '.join(map(str, lora.layers_to_transform))}")
    if lora.starts_from_base:
        found.append(f"Initialized by {lora.init}; the files contain trained minus initial weights, at twice the rank")
    if lora.modules_to_save:
        found.append(f"Fully trained modules: {', '.join(lora.modules_to_save)}")
    if lora.names_experts:
        found.append("Adapted experts: see `target_parameters` in `adapter_config.json`")
    if has_packed_experts:
        found.append("Trained on experts in 4 bits, which transformers alone keeps in 16; losses differ a little")
    if tokens:
        named = ", ".join(f"`{token}`" for token in tokens)
        found.append(f"Trained tokens: {named}; `AutoPeftModelForCausalLM` resizes the embedding for them")
    return found


def _load(base: BaseSection) -> str:
    """Write Python code that loads the adapter with PEFT alone, on the base as `base.load_base` loads it."""
    stored, dtype = stored_quantization(base), f"torch.{base.compute_dtype}"
    options, settings = {"dtype": dtype}, ""
    left_out = f", llm_int8_skip_modules={plain}" if (plain := plain_layers(base)) else ""
    if stored is not None and stored.is_dequantized:
        settings = f"{DEQUANTIZED[stored.method]}(dequantize=True)"
    elif stored is None and base.is_4bit:
        settings = f'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="{base.quantization}", '
        settings += f"bnb_4bit_use_double_quant={base.double_quant}, bnb_4bit_compute_dtype={dtype}{left_out})"
    elif stored is None and base.quantization == "int8":
        settings = f"BitsAndBytesConfig(load_in_8bit=True{left_out})"
    imported = ["GenerationConfig"]
    if settings:
        imported.append(settings.partition("(")[0])
        options = {"quantization_config": "quantized", **options}
    given = ", ".join(f"{name}={value}" for name, value in options.items())
    if is_only_multimodal(base):
        imported.append("AutoModelForImageTextToText")
        name = hub_id(base.model) or "BASE_FOLDER"
        peft = "PeftModel"
        revision = f'revision="{base.revision}", ' if base.revision else ""
        load = [
            f'base = AutoModelForImageTextToText.from_pretrained("{name}", {revision}{given})',
            'model = PeftModel.from_pretrained(base, "ID_OR_FOLDER")',
        ]
    else:
        peft = "AutoPeftModelForCausalLM"
        load = [f'model = AutoPeftModelForCausalLM.from_pretrained("ID_OR_FOLDER", {given})']
    lines = ["import torch", f"from peft import {peft}", f"from transformers import {', '.join(sorted(imported))}", ""]
    lines += [f"quantized = {settings}"] if settings else []
    lines += [*load, 'model.generation_config = GenerationConfig.from_pretrained("ID_OR_FOLDER")  # stop tokens']
    if base.is_4bit and (stored is None or not stored.is_dequantized):
        lines += _KEEP_4BIT
    return "\n".join(lines)


_KEEP_4BIT = (
    "for module in model.modules():  # some CPUs repack 4-bit weights on first use, which breaks DoRA and gradients",
    '    if hasattr(module, "support_avx512bf16_for_cpu"):',
    "        module.support_avx512bf16_for_cpu = False",
)
"""The effect of `base.keep_trainable`, for users who load the adapter without this package."""


def _prompts(data: DataSection) -> str:
    match data.format:
        case "messages" | "sharegpt":
            return "conversations, in the chat template of the tokenizer"
        case "alpaca":
            return "instructions in the format of Stanford Alpaca, up to `### Response:`"
        case "template":
            return f"in the template `{data.template}`, up to the last field"
        case "prompt":
            return "plain text, as in the column `prompt` of the training rows"
        case "text":
            return "none: it was trained on whole texts"
        case _:
            assert_never(data.format)
