"""What an adapter's README says: the hub's metadata, and a page for people."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.base import hub_id
from orchestrator.spec import TrialConfig
from orchestrator.spec.sections import BaseSection, DataSection

_PAGE = """
# {title}

Step {step} of trial `{trial_id}`, chosen by {metric} ({value:.6g}). LoRA rank {rank}, alpha {alpha:g}, dropout
{dropout:g}, learning rate {learning_rate:g}.

- Base: {base}, held as {quantization}.
- Prompts: {prompts}.{variants}
- `trial.json` holds the whole configuration, `manifest.json` a sha256 of each file and the versions of the packages.

```python
{load}
```
"""


_MERGED = """
# {title}

The LoRA adapter `{name}`, merged onto the {onto} weights of its base, in {dtype}. {parity}.

- Base: {base}; the adapter was trained on it held as {quantization}.
- Prompts: {prompts}.
- `manifest.json` holds the whole configuration, a sha256 of each file and the versions of the packages.
"""


def adapter_card(config: TrialConfig, trial_id: str, step: int, metric: str, values: Mapping[str, float]) -> str:
    """The model card of an adapter.

    Args:
        config: how it was trained.
        trial_id: names it.
        step: optimizer step of its weights.
        metric: by which the step was chosen.
        values: what was measured on the held-out rows at this step, `metric` among it.
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
        variants="".join(f"\n- {line}." for line in _variants(config)),
        load=_load(config.base),
    )
    return f"---\n{metadata.to_yaml()}\n---\n{page}"


def merged_card(config: TrialConfig, name: str, dtype: str, onto: str, parity: str) -> str:
    """The model card of a base with an adapter merged into it.

    Args:
        config: how the adapter was trained.
        name: of the adapter.
        dtype: of the merged weights.
        onto: which weights of the base it was merged onto.
        parity: how near it came to the adapter.
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
    """The hub's metadata, a `ModelCardData`: no licence, for that is the owner's to choose; no path of this machine.

    Args:
        config: how the adapter was trained.
        name: of the model, for its evaluation results.
        values: what was measured on the held-out rows; what is not finite is left out.
        library: that loads it.
        relation: to the base: adapter or finetune.
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
        if math.isfinite(value)
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
        return "the small one that ships with the orchestrator, which is not on the hub"
    if hub_id(base.model) is None:
        return f"a local folder, `{Path(base.model).name}`, which is not on the hub under a name known here"
    return f"`{base.model}`" + (f" at `{base.revision}`" if base.revision else "")


def _variants(config: TrialConfig) -> list[str]:
    """What more there is to the adapter than LoRA on all layers alike."""
    lora, tokens = config.lora, config.base.new_tokens
    found = []
    if lora.dora or lora.rslora:
        kinds = [name for name, on in (("DoRA", lora.dora), ("rsLoRA (alpha / sqrt(rank))", lora.rslora)) if on]
        found.append(f"Variant: {' and '.join(kinds)}")
    if lora.rank_pattern or lora.alpha_pattern:
        found.append("Single layers have ranks or alphas of their own, see `adapter_config.json`")
    if lora.layers_to_transform is not None:
        found.append(f"Adapted layers: {', '.join(map(str, lora.layers_to_transform))}")
    if lora.starts_from_base:
        found.append(f"First weights by {lora.init}; its files hold the update less the first, at twice the rank")
    if lora.modules_to_save:
        found.append(f"Trained whole: {', '.join(lora.modules_to_save)}")
    if tokens:
        named = ", ".join(f"`{token}`" for token in tokens)
        found.append(f"Trained tokens: {named}; `AutoPeftModelForCausalLM` makes room for them")
    return found


def _load(base: BaseSection) -> str:
    """Write Python that loads the adapter by PEFT alone, on the base as `base.load_base` holds it."""
    dtype = f"torch.{base.compute_dtype}"
    lines = ["import torch", "from peft import AutoPeftModelForCausalLM"]
    options = {"dtype": dtype}
    if base.quantization != "none":
        if base.is_4bit:
            form = f'load_in_4bit=True, bnb_4bit_quant_type="{base.quantization}", '
            form += f"bnb_4bit_use_double_quant={base.double_quant}, bnb_4bit_compute_dtype={dtype}"
        else:
            form = "load_in_8bit=True"
        lines += ["from transformers import BitsAndBytesConfig, GenerationConfig", ""]
        lines.append(f"quantized = BitsAndBytesConfig({form})")
        options = {"quantization_config": "quantized", "dtype": dtype}
    else:
        lines += ["from transformers import GenerationConfig", ""]
    given = ", ".join(f"{name}={value}" for name, value in options.items())
    lines.append(f'model = AutoPeftModelForCausalLM.from_pretrained("ID_OR_FOLDER", {given})')
    lines.append('model.generation_config = GenerationConfig.from_pretrained("ID_OR_FOLDER")  # where answers stop')
    if base.is_4bit:
        lines += _KEEP_4BIT
    return "\n".join(lines)


_KEEP_4BIT = (
    "for module in model.modules():  # some CPUs repack 4-bit weights at the first pass: DoRA and gradients go wrong",
    '    if hasattr(module, "support_avx512bf16_for_cpu"):',
    "        module.support_avx512bf16_for_cpu = False",
)
"""What `base.keep_trainable` does, for who loads the adapter without it."""


def _prompts(data: DataSection) -> str:
    match data.format:
        case "messages" | "sharegpt":
            return "conversations, by the chat template of the tokenizer"
        case "alpaca":
            return "instructions in Stanford Alpaca's form, up to `### Response:`"
        case "template":
            return f"in the form `{data.template}`, up to the last field"
        case "prompt":
            return "plain text, as in the column `prompt` of the rows"
        case "text":
            return "none: it was trained on whole texts"
