"""The classic engine: trl's SFTTrainer as it is, built from a trial's configuration."""

from pathlib import Path
from typing import Any

from orchestrator.adapters.bundle import Adapter
from orchestrator.data import PreparedData
from orchestrator.spec import TrialConfig
from orchestrator.training.applied import read_back
from orchestrator.training.fast.pack import Work
from orchestrator.training.loss_meter import LossMeter
from orchestrator.training.precision import resolve_precision


class TrlLoop:
    """SFTTrainer's own loop."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._meter = LossMeter(trainer.model)

    def train(self, checkpoint: str | None) -> Work:
        """All of it at once: from the start or a checkpoint to the last step, or until a callback stops it."""
        yield from ()
        self.trainer.train(resume_from_checkpoint=checkpoint)
        self._meter.close()

    def adapter(self) -> Adapter:
        """A copy: the optimizer writes into the model's own tensors."""
        return Adapter.of(self.trainer.model).copied()

    def measured(self) -> dict[str, float]:
        """`eval/loss` and `eval/token_accuracy` of the evaluation that has just run."""
        return self._meter.read()

    def read_back(self) -> dict[str, Any]:
        """Live values by the names of `applied.expected`."""
        return read_back(self.trainer.model, self.trainer.optimizer)


def build_trainer(config: TrialConfig, model: Any, tokenizer: Any, data: PreparedData, checkpoints: Path) -> Any:
    """An SFTTrainer that adapts `model` (a bare base) on `data`.

    Args:
        config: the trial.
        model: the bare base, from `base.lease`.
        tokenizer: its tokenizer, with a padding token.
        data: tokenised rows.
        checkpoints: folder of the trainer's checkpoints.
    """
    import torch
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    lora, training = config.lora, config.training
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
        peft_config=LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=lora.target_modules,
            bias=lora.bias,
            task_type="CAUSAL_LM",
            revision=config.base.revision,
        ),
    )
    # SFTTrainer casts adapters on a quantised base to bfloat16; the optimizer is built later, from what is here.
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(getattr(torch, training.adapter_dtype))
    return trainer
