"""The classic engine: trl's SFTTrainer as it is, built from a trial's configuration."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from orchestrator.adapters.bundle import Adapter
from orchestrator.data import PreparedData
from orchestrator.errors import TrialError
from orchestrator.record import RowScores
from orchestrator.spec import TrialConfig
from orchestrator.spec.sections import TrainingSection
from orchestrator.training.adapted import draw, lora_config
from orchestrator.training.applied import read_back, set_rate
from orchestrator.training.fast.pack import Work
from orchestrator.training.loss_meter import LossMeter
from orchestrator.training.precision import resolve_precision

APART = 1e-3
"""What logits of the same tokens may differ by, where the tokens beside them are others."""


def import_trainer() -> None:
    """Import what `build_trainer` needs, which takes seconds: before the first trial comes."""
    import trl.trainer.sft_trainer  # noqa: F401


class TrlLoop:
    """SFTTrainer's own loop."""

    def __init__(self, trainer: Any, training: TrainingSection) -> None:
        self.trainer = trainer
        self._training = training
        self._meter = LossMeter(trainer.model, list(trainer._get_eval_sampler(trainer.eval_dataset)))

    def train(self, checkpoint: str | None) -> Work:
        """All of it at once: from the start or a checkpoint to the last step, or until a callback stops it."""
        yield from ()
        if checkpoint is not None:
            self.trainer.add_callback(_OwnRate(self.trainer, self._training))
        self.trainer.train(resume_from_checkpoint=checkpoint)
        self._meter.close()

    def adapter(self) -> Adapter:
        """A copy: the optimizer writes into the model's own tensors."""
        return Adapter.of(self.trainer.model).copied()

    def scores(self) -> RowScores:
        """Of the evaluation that has just run."""
        return self._meter.read()

    def read_back(self) -> dict[str, Any]:
        """Live values by the names of `applied.expected`."""
        return read_back(self.trainer.model, self.trainer.optimizer)


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
    with torch.no_grad():
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


def build_trainer(config: TrialConfig, model: Any, tokenizer: Any, data: PreparedData, checkpoints: Path) -> Any:
    """An SFTTrainer that adapts `model` on `data`.

    Args:
        config: the trial.
        model: a shell of the base, which PEFT is still to adapt; or from `adapted`.
        tokenizer: its tokenizer, with a padding token.
        data: tokenised rows.
        checkpoints: folder of the trainer's checkpoints.
    """
    import torch
    from peft import PeftModel
    from trl import SFTConfig, SFTTrainer

    training = config.training
    precision = resolve_precision(training)
    on_cpu = not torch.cuda.is_available()
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(checkpoints),
            max_steps=training.steps or -1,
            num_train_epochs=training.epochs or 1.0,
            per_device_train_batch_size=training.batch_size,
            per_device_eval_batch_size=training.eval_batch_size,
            gradient_accumulation_steps=training.accumulation,
            learning_rate=training.learning_rate,
            lr_scheduler_type=training.schedule,
            warmup_steps=training.warmup,
            optim=training.optimizer,
            max_grad_norm=training.max_grad_norm,
            weight_decay=training.weight_decay,
            activation_checkpointing=training.recompute is True,
            train_sampling_strategy="group_by_length" if training.group_by_length else "random",
            eval_strategy="steps",
            eval_steps=training.eval_steps,
            logging_steps=training.logging_steps,
            save_strategy="steps",
            save_steps=training.save_steps or training.eval_steps,
            seed=training.seed,
            bf16=precision == "bf16",
            fp16=precision == "fp16",
            use_cpu=on_cpu,
            dataloader_pin_memory=not on_cpu,
            logging_nan_inf_filter=False,  # it would hide NaN
            disable_tqdm=True,
            report_to=[],
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},  # rows come with ids and labels
        ),
        train_dataset=data.train,
        eval_dataset=data.held_out,
        processing_class=tokenizer,
        # SFTTrainer's own, for which it would lay out the whole vocabulary, to look for the padding token.
        data_collator=_Collator(tokenizer.pad_token_id),
        peft_config=None if isinstance(model, PeftModel) else lora_config(config),
    )
    dtype = getattr(torch, training.adapter_dtype)
    if config.lora.bias != "none":  # SFTTrainer casts what trains on a quantised base to bfloat16
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
    draw(trainer.model, training.seed, dtype)
    for told in (trainer.model.config.get_text_config(), trainer.model.generation_config):
        told.pad_token_id = tokenizer.pad_token_id  # it goes with that
    return trainer
