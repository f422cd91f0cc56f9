"""Suggest what an unknown field may mean: names of PEFT, transformers, trl and Tune, and fields of other sections."""

import difflib
from collections.abc import Sequence

from pydantic import BaseModel

FIELD_OF_NAME = {
    "r": "lora.rank",
    "lora_r": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "use_rslora": "lora.rslora",
    "use_dora": "lora.dora",
    "init_lora_weights": "lora.init",
    "lr": "training.learning_rate",
    "per_device_train_batch_size": "training.batch_size",
    "per_device_eval_batch_size": "training.eval_batch_size",
    "gradient_accumulation_steps": "training.accumulation",
    "gradient_checkpointing": "training.recompute",
    "num_train_epochs": "training.epochs",
    "num_epochs": "training.epochs",
    "max_steps": "training.steps",
    "lr_scheduler_type": "training.schedule",
    "warmup_ratio": "training.warmup",
    "warmup_steps": "training.warmup",
    "optim": "training.optimizer",
    "adam_beta1": "training.beta1",
    "adam_beta2": "training.beta2",
    "adam_epsilon": "training.epsilon",
    "loss_type": "training.loss",
    "label_smoothing_factor": "training.label_smoothing",
    "neftune_noise_alpha": "training.neftune_alpha",
    "bf16": "training.precision: bf16",
    "fp16": "training.precision: fp16",
    "load_in_4bit": "base.quantization: nf4",
    "load_in_8bit": "base.quantization: int8",
    "bnb_4bit_quant_type": "base.quantization",
    "bnb_4bit_compute_dtype": "base.compute_dtype",
    "bnb_4bit_use_double_quant": "base.double_quant",
    "model_name_or_path": "base.model",
    "dataset_name": "data.source",
    "max_seq_length": "data.max_length",
    "num_samples": "search.num_trials",
    "n_trials": "search.num_trials",
    "output_dir": "output.folder",
    "grace_period": "scheduler.grace_steps",
    "perturbation_interval": "scheduler.interval_steps",
    "quantile_fraction": "scheduler.quantile",
    "perturbation_factors": "scheduler.factors",
    "scheduler.name": "scheduler.kind",
    "scheduler.type": "scheduler.kind",
    "search.name": "search.algorithm",
    "search.type": "search.algorithm",
    "search.kind": "search.algorithm",
}
"""Name in another library, or a likely mistake -> our field, with a value if the name implies one."""


VALUE_OF_NAME = {
    "adam": "adamw_torch",
    "adamw": "adamw_torch",
    "adamw_hf": "adamw_torch",
    "adamw_bnb_8bit": "adamw_8bit",
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
    "4bit": "nf4",
    "8bit": "int8",
    "tpe": "optuna",
    "pruner": "median",
    "successive_halving": "asha",
    "chatml": "messages",
    "chat": "messages",
}
"""Value in another library, or a likely mistake -> ours, if the field has it."""


def suggested_value(written: object, values: Sequence[str]) -> str | None:
    """Return the value that an unknown one probably means, or None.

    Args:
        written: the value as it was written.
        values: the values that the field has.
    """
    if not isinstance(written, str):
        return None
    plain = {_plain(value): value for value in values}
    named = VALUE_OF_NAME.get(written.lower())
    if found := plain.get(_plain(written)) or (named if named in values else None):
        return found
    close = difflib.get_close_matches(_plain(written), plain, n=1)
    return plain[close[0]] if close else None


def _plain(value: str) -> str:
    return value.lower().replace("_", "").replace("-", "").replace(" ", "")


def suggested_field(where: str, model: type[BaseModel], root: type[BaseModel]) -> str | None:
    """Return the field that an unknown one probably means, or None.

    Args:
        where: the dotted field as it was written.
        model: the section in which it was looked up.
        root: the model of the whole document.
    """
    name = where.rpartition(".")[2]
    if found := FIELD_OF_NAME.get(where) or FIELD_OF_NAME.get(name):
        return found
    if elsewhere := _fields_named(name, root):
        return elsewhere[0]
    close = difflib.get_close_matches(name, model.model_fields, n=1)
    return close[0] if close else None


def _fields_named(name: str, root: type[BaseModel]) -> list[str]:
    """Return the sections, and the fields of sections, that have exactly this name."""
    sections = {section: field.annotation for section, field in root.model_fields.items()}
    inner = [
        f"{section}.{name}"
        for section, kind in sections.items()
        if isinstance(kind, type) and issubclass(kind, BaseModel) and name in kind.model_fields
    ]
    return [name] * (name in sections) + inner
