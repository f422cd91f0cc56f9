"""The classic engine: trl's SFTTrainer as it is, built from a trial's configuration."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import TrainableTokensWrapper
from transformers import TrainerCallback

from orchestrator.adapters.bundle import Adapter
from orchestrator.data import PreparedData
from orchestrator.errors import TrialError
from orchestrator.record import RowScores
from orchestrator.spec import TrialConfig
from orchestrator.spec.sections import TrainingSection
from orchestrator.training.engines.loss_meter import LossMeter
from orchestrator.training.engines.sampler import LengthGroupedSampler, row_lengths
from orchestrator.training.fast.drive.multi_lora import TrialSteps
from orchestrator.training.model.adapter_init import init_adapter
from orchestrator.training.model.precision import resolve_precision
from orchestrator.training.model.readback import read_back, set_rate

APART = 1e-3
"""What logits of the same tokens may differ by, where the tokens beside them are others."""


@cache
def import_trainer() -> None:
    """Import what `build_trainer` needs, which takes seconds: before the first trial comes.

    Each trainer asks accelerate again and again whether packages are installed and whether its model is PEFT's, for
    which that reads their metadata and looks at every module for one that was compiled, where it needs to know of the
    outermost alone (1.15, `utils/imports.py`; `utils/other.py`, `extract_model_from_parallel`): a fifth of a set-up.
    """
    import trl.trainer.sft_trainer  # noqa: F401
    from accelerate.utils import imports, other

    imports._is_package_available = cache(imports._is_package_available)
    other.has_compiled_regions = lambda model: "_orig_mod" in model.__dict__


class TrlLoop:
    """SFTTrainer's own loop."""

    def __init__(self, trainer: Any, config: TrialConfig) -> None:
        self.trainer = trainer
        self._training = config.training
        self._taken = Adapter.of(trainer.model).copied() if config.lora.starts_from_base else None
        """The first update, which the base lacks."""
        self._meter = LossMeter(trainer.model, list(trainer._get_eval_sampler(trainer.eval_dataset)))

    def train(self, checkpoint: str | None) -> TrialSteps:
        """All of it at once: from the start or a checkpoint to the last step, or until a callback stops it."""
        yield from ()
        if checkpoint is not None:
            self.trainer.add_callback(_OwnRate(self.trainer, self._training))
        self.trainer.train(resume_from_checkpoint=checkpoint)
        self._meter.close()

    def adapter(self) -> Adapter:
        """A copy: the optimizer writes into the model's own tensors."""
        trained = Adapter.of(self.trainer.model).copied()
        return trained if self._taken is None else trained.minus(self._taken)

    def scores(self) -> RowScores:
        """Of the evaluation that has just run."""
        return self._meter.read()

    def read_back(self) -> dict[str, Any]:
        """Live values by the names of `expected.expected`."""
        return read_back(self.trainer)


def require_apart(trainer: Any) -> None:
    """See that the rows of a packed sequence know nothing of each other: not every base's attention heeds positions.

    Raises:
        TrialError: other tokens in a row change what the model makes of the row behind it.
    """
    import torch

    packed = next((row for row in trainer.train_dataset if len(row["seq_lengths"]) > 1), None)
    if packed is None:
        return
    model, (*_, before, last) = trainer.model, packed["seq_lengths"]
    inputs = trainer._prepare_inputs(trainer.data_collator([packed]))
    del inputs["labels"]
    changed = inputs["input_ids"].clone()
    changed[0, -last - before : -last] = changed[0, -last - before : -last] == 0  # 1 or 0, and never what it was
    was_training = model.training
    model.eval()
    with torch.no_grad(), trainer.accelerator.autocast():  # as in a step: bf16 weights may meet float32 ones
        own, other = (
            model(**{**inputs, "input_ids": ids}).logits[0, -last:].float() for ids in (inputs["input_ids"], changed)
        )
    model.train(was_training)
    if not torch.allclose(own, other, atol=APART, rtol=APART):
        raise TrialError(
            f"data.packing: on this base packed rows see each other: {(own - other).abs().max():.2g} in the logits",
            "Set data.packing: false.",
        )


class _Collator:
    """SFTTrainer's own: a batch of packed rows is one sequence with positions that begin anew, others are padded."""

    def __init__(self, pad_token_id: int) -> None:
        from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

        self._padded = DataCollatorForLanguageModeling(pad_token_id)
        self._packed = DataCollatorForLanguageModeling(pad_token_id, padding_free=True)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        return (self._packed if "seq_lengths" in rows[0] else self._padded)(rows)  # type: ignore[no-any-return]


class _OwnRate(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """`set_rate` once the Trainer has loaded a checkpoint."""

    def __init__(self, trainer: Any, training: TrainingSection) -> None:
        self._trainer = trainer
        self._training = training

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        set_rate(self._trainer, self._training)


def build_trainer(
    config: TrialConfig,
    model: Any,
    tokenizer: Any,
    data: PreparedData,
    checkpoints: Path,
    read: Mapping[str, torch.Tensor] | None = None,
) -> Any:
    """An SFTTrainer that trains the adapter of `model` on `data`, from its first weights.

    Args:
        config: the trial.
        model: a `PeftModel`, from `adapted` or `adapted_by_peft`.
        tokenizer: its tokenizer, with a padding token.
        data: tokenised rows.
        checkpoints: folder of the trainer's checkpoints.
        read: for `init_adapter`.
    """
    # Not from trl: while another thread imports the trainer, its lazy module has no such name (trl 1.16).
    from trl.trainer.sft_trainer import SFTTrainer

    training = config.training
    trainer = SFTTrainer(
        model=model,
        args=_arguments(training, checkpoints),
        train_dataset=data.train,
        eval_dataset=data.held_out,
        processing_class=tokenizer,
        # SFTTrainer's own, for which it would lay out the whole vocabulary, to look for the padding token.
        data_collator=_Collator(tokenizer.pad_token_id),
    )
    if training.group_by_length:
        step_rows = trainer.args.train_batch_size * training.accumulation
        sampler = LengthGroupedSampler(row_lengths(data.train), step_rows, training.seed)
        trainer._get_train_sampler = lambda *_: sampler  # the Trainer's own draws from the process's random state
    dtype = getattr(torch, training.adapter_dtype)
    for name, parameter in trainer.model.named_parameters():  # SFTTrainer casts what trains on a quantised base
        if parameter.requires_grad:  # bfloat16 would not hold the small steps of magnitudes, as trl knows
            parameter.data = parameter.data.to(torch.float32 if "lora_magnitude_vector" in name else dtype)
    init_adapter(trainer.model, config.lora, training.seed, dtype, read)
    head = trainer.model.get_output_embeddings()
    if isinstance(head, TrainableTokensWrapper):  # trl's fused head reads its bias, which the wrapper does not pass on
        head.bias = head.token_adapter.get_base_layer().bias
    for told in (trainer.model.config.get_text_config(), trainer.model.generation_config):
        told.pad_token_id = tokenizer.pad_token_id  # it goes with that
    return trainer


def _arguments(training: TrainingSection, checkpoints: Path) -> Any:
    """SFTTrainer's arguments."""
    from trl.trainer.sft_config import SFTConfig

    precision, on_cpu = resolve_precision(training), not torch.cuda.is_available()
    return SFTConfig(
        output_dir=str(checkpoints),
        max_steps=training.steps or -1,
        num_train_epochs=training.epochs or 1.0,
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=training.eval_batch_size,
        gradient_accumulation_steps=training.accumulation,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.schedule,
        lr_scheduler_kwargs=_schedule_options(training),
        warmup_steps=training.warmup,
        optim=training.optimizer,
        optim_args=f"momentum={training.momentum}" if training.momentum else None,
        adam_beta1=training.beta1,
        adam_beta2=training.beta2,
        adam_epsilon=training.epsilon,
        max_grad_norm=training.max_grad_norm,
        weight_decay=training.weight_decay,
        loss_type=training.loss,
        label_smoothing_factor=training.label_smoothing,
        neftune_noise_alpha=training.neftune_alpha,
        activation_checkpointing=training.recompute is True,
        train_sampling_strategy="group_by_length" if training.group_by_length else "random",
        eval_strategy="steps",
        eval_steps=training.eval_steps,
        logging_steps=training.logging_steps,
        save_strategy="steps",
        save_steps=training.save_steps or training.eval_steps,
        seed=training.seed,
        data_seed=training.seed,  # else the order of rows comes from the process's seed, which other trials set too
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        tf32=None if on_cpu else training.tf32,
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        logging_nan_inf_filter=False,  # it would hide NaN
        disable_tqdm=True,
        report_to=[],
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},  # rows come with ids and labels
    )


def _schedule_options(training: TrainingSection) -> dict[str, Any]:
    """What transformers' functions of this schedule take beside warmup and steps (5.23, `optimization.py`)."""
    match training.schedule:
        case "cosine_with_restarts":
            return {"num_cycles": training.cycles}
        case "cosine_with_min_lr":
            return {"min_lr_rate": training.final_rate}
        case "polynomial":
            return {"lr_end": training.final_rate * training.learning_rate}
        case "warmup_stable_decay":
            return {"num_decay_steps": training.decay_steps, "min_lr_ratio": training.final_rate}
        case _:
            return {}
