"""The classic engine: trl's SFTTrainer, built from a trial's configuration, with its own training loop."""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import TrainableTokensWrapper
from transformers import TrainerCallback

from orchestrator.adapters.bundle import Adapter
from orchestrator.adapters.generate import generate_ids
from orchestrator.adapters.stops import stop_at
from orchestrator.data import PreparedData
from orchestrator.errors import TrialError
from orchestrator.positions import independent_length, rows_per_pass
from orchestrator.record import RowScores
from orchestrator.spec import TrialConfig
from orchestrator.spec.sections import TrainingSection
from orchestrator.training.engines.loss_meter import LossMeter
from orchestrator.training.engines.sampler import LengthGroupedSampler, row_lengths
from orchestrator.training.fast.drive.answers import Answering
from orchestrator.training.fast.drive.multi_lora import TrialSteps
from orchestrator.training.model.adapter_init import init_adapter
from orchestrator.training.model.peft_model import load_adapter_weights
from orchestrator.training.model.precision import resolve_precision
from orchestrator.training.model.rank_change import begin_with
from orchestrator.training.model.readback import read_back, set_rate
from orchestrator.training.questions import Questions

MAX_LOGIT_CHANGE = 1e-3
"""How much the logits of a packed sequence may change when the tokens of the sequence before it change."""


@cache
def import_trainer() -> None:
    """Import what `build_trainer` needs, and speed up accelerate. A worker calls this before the first trial comes.

    The import takes seconds. Only the first call does anything.
    """
    import trl.trainer.sft_trainer  # noqa: F401

    _patch_accelerate()


def _patch_accelerate() -> None:
    """Replace two slow functions of accelerate (1.15) in this process. They take a fifth of a trial's set-up.

    Each trainer asks many times whether packages are installed; accelerate reads their metadata each time
    (`utils/imports.py`). The answers are cached here. Each trainer also asks whether its model is compiled; accelerate
    then inspects every module (`utils/other.py`, `extract_model_from_parallel`), although only the outermost matters.
    """
    from accelerate.utils import imports, other

    imports._is_package_available = cache(imports._is_package_available)
    other.has_compiled_regions = lambda model: "_orig_mod" in model.__dict__


class TrlLoop:
    """SFTTrainer's own loop, as a `Loop`."""

    def __init__(
        self, trainer: Any, config: TrialConfig, questions: Questions | None, on_progress: Callable[[], None]
    ) -> None:
        """
        Args:
            trainer: an SFTTrainer for this trial.
            config: the trial.
            questions: the prompts that it answers; None for none.
            on_progress: called for each token of the answers.
        """
        self.trainer = trainer
        self._questions = questions
        self._on_progress = on_progress
        self._training = config.training
        self._initial = Adapter.of(trainer.model).copied() if config.lora.starts_from_base else None
        """The first weights, if a hook subtracts their update from the base's output (olora, pissa)."""
        self._meter = LossMeter(trainer.model, list(trainer._get_eval_sampler(trainer.eval_dataset)))

    def train(self, checkpoint: str | None, evaluates_first: bool = False) -> TrialSteps:
        """Train without yielding to the last step or until a callback stops the trial; see `engines.loop.Loop`."""
        yield from ()
        if checkpoint is not None:
            self.trainer.add_callback(_SetRate(self.trainer, self._training))
        if evaluates_first:
            self.trainer.add_callback(_EvaluateFirst(self.trainer))
        with suppress(_NoStepLeft):
            self.trainer.train(resume_from_checkpoint=checkpoint)
        self._meter.close()

    def adapter(self) -> Adapter:
        """Return a copy of the adapter, for the optimizer writes into the model's tensors."""
        trained = Adapter.of(self.trainer.model).copied()
        return trained if self._initial is None else trained.minus(self._initial)

    def scores(self) -> RowScores | None:
        """Return the scores of the evaluation that has just run; see `engines.loop.Loop`."""
        scores = self._meter.read()
        if self._questions is None or not self._questions.at_evaluations:
            return scores
        metrics = self._answer()
        return None if metrics is None else scores.model_copy(update={"metrics": metrics})

    def answer(self, weights: Mapping[str, Any]) -> Answering:
        """Load an adapter in place of the trained one, and have it answer."""
        yield from ()
        load_adapter_weights(self.trainer.model, weights)
        return self._answer()

    def _answer(self) -> dict[str, list[float]] | None:
        """Have the adapter answer. Return the metrics; None if the trial was asked to end meanwhile."""
        began, model, questions = time.monotonic(), self.trainer.model, self._questions
        assert questions is not None
        stop_at(model, questions.stop_tokens)
        answers = generate_ids(
            model,
            self.trainer.processing_class,
            questions.ids,
            questions.max_new_tokens,
            self.trainer.args.per_device_eval_batch_size,
            on_token=self._on_progress,
            is_stopping=questions.is_stopping,
        )
        if questions.is_stopping():
            return None
        return questions.score(answers, time.monotonic() - began)

    def read_back(self) -> dict[str, Any]:
        """Return the live values, by the names of `model.targets.expected`."""
        return read_back(self.trainer)


def require_independent_sequences(trainer: Any) -> None:
    """Check that the sequences of a packed row do not see each other. Some bases' attention ignores the positions.

    Raises:
        TrialError: other tokens in one sequence change the logits of the next, or the base refuses packed rows.
    """
    import torch

    row = next((row for row in trainer.train_dataset if len(row["seq_lengths"]) > 1), None)
    if row is None:
        return
    model, (*_, before, last) = trainer.model, row["seq_lengths"]
    inputs = trainer._prepare_inputs(trainer.data_collator([row]))
    del inputs["labels"]
    changed = inputs["input_ids"].clone()
    changed[0, -last - before : -last] = changed[0, -last - before : -last] == 0  # 0 becomes 1, all else 0
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), trainer.accelerator.autocast():  # as in a step, for bf16 and float32 weights may be mixed
            original, other = (
                model(**{**inputs, "input_ids": ids}).logits[0, -last:].float()
                for ids in (inputs["input_ids"], changed)
            )
    except ValueError as error:  # linear attention without the package `causal_conv1d`
        raise TrialError(
            f"data.packing: this base does not accept packed rows: {error}", "Set data.packing: false."
        ) from error
    model.train(was_training)
    if not torch.allclose(original, other, atol=MAX_LOGIT_CHANGE, rtol=MAX_LOGIT_CHANGE):
        change = float((original - other).abs().max())
        raise TrialError(
            f"data.packing: on this base packed rows see each other: their logits change by {change:.2g}",
            "Set data.packing: false.",
        )


class _Collator:
    """trl's collators: packed rows become one sequence whose positions restart; other rows are padded."""

    def __init__(self, pad_token_id: int) -> None:
        from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

        self._padded = DataCollatorForLanguageModeling(pad_token_id)
        self._packed = DataCollatorForLanguageModeling(pad_token_id, padding_free=True)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        return (self._packed if "seq_lengths" in rows[0] else self._padded)(rows)  # type: ignore[no-any-return]


class _SetRate(TrainerCallback):  # type: ignore[misc]  # mypy skips transformers
    """Calls `set_rate` after the Trainer has loaded a checkpoint."""

    def __init__(self, trainer: Any, training: TrainingSection) -> None:
        self._trainer = trainer
        self._training = training

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        set_rate(self._trainer, self._training)


class _NoStepLeft(Exception):
    """Ends the Trainer's loop before its first step."""


class _EvaluateFirst(TrainerCallback):  # type: ignore[misc]  # mypy skips transformers
    """Makes the evaluation of a checkpoint's step after the Trainer has loaded the checkpoint."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trainer.evaluate()
        if control.should_training_stop or state.global_step == state.max_steps:
            raise _NoStepLeft


def build_trainer(
    config: TrialConfig,
    model: Any,
    tokenizer: Any,
    data: PreparedData,
    checkpoints: Path,
    components: Mapping[str, torch.Tensor] | None = None,
    initial: Path | None = None,
    micro_batch: int | None = None,
) -> Any:
    """Build an SFTTrainer that trains the adapter of `model` on `data`, and set the adapter's first weights.

    Args:
        config: the trial.
        model: a `PeftModel`, from `model_from_template` or `model_from_peft`.
        tokenizer: its tokenizer, with a padding token.
        data: tokenized rows.
        checkpoints: folder of the trainer's checkpoints.
        components: for `init_adapter`.
        initial: folder of the adapter whose weights are the first ones; None for those of `init_adapter`.
        micro_batch: rows in a forward pass, a divisor of `training.batch_size`; None for all of them. A step has the
            same rows, and evaluations have as many times fewer rows in a pass.
    """
    # Not `from trl`: its lazy module lacks the name while another thread imports the trainer (trl 1.16).
    from trl.trainer.sft_trainer import SFTTrainer

    training = config.training
    passes = training.batch_size // (micro_batch or training.batch_size)
    eval_batch_size = max(1, _eval_batch_size(model.config, training, data) // passes)
    trainer = SFTTrainer(
        model=model,
        args=_arguments(training, checkpoints, eval_batch_size, passes),
        train_dataset=data.train,
        eval_dataset=data.held_out,
        processing_class=tokenizer,
        # To build its own, SFTTrainer would list the whole vocabulary in search of the padding token.
        data_collator=_Collator(tokenizer.pad_token_id),
    )
    if training.group_by_length:
        step_rows = training.batch_size * training.accumulation
        sampler = LengthGroupedSampler(row_lengths(data.train), step_rows, training.seed)
        trainer._get_train_sampler = lambda *_: sampler  # the default draws from the process's random state
    dtype = getattr(torch, training.adapter_dtype)
    for name, parameter in trainer.model.named_parameters():  # SFTTrainer casts trained weights on a quantized base
        if parameter.requires_grad:  # bfloat16 loses the small steps of DoRA's magnitudes; trl spares them too
            parameter.data = parameter.data.to(torch.float32 if "lora_magnitude_vector" in name else dtype)
    init_adapter(trainer.model, config.lora, training.seed, dtype, components)
    if initial is not None:
        begin_with(trainer.model, initial, training.seed)
    own = trainer.model.get_base_model()
    if own.base_model is own and "model" in own._modules:  # Llama4 and Mllama name it wrongly (transformers 5.23)
        own.base_model_prefix = "model"  # trl's fused head runs this part, without the head
    head = trainer.model.get_output_embeddings()
    if isinstance(head, TrainableTokensWrapper):  # trl's fused head reads `bias`, which the wrapper hides
        head.bias = head.token_adapter.get_base_layer().bias
    for each in (trainer.model.config.get_text_config(), trainer.model.generation_config):
        each.pad_token_id = tokenizer.pad_token_id  # SFTTrainer sets it only with its own collator
    return trainer


def _eval_batch_size(config: Any, training: TrainingSection, data: PreparedData) -> int:
    """Return the rows of an evaluation's forward pass: 1 if their losses would depend on each other's lengths."""
    if independent_length(config) is None:
        return training.eval_batch_size
    return rows_per_pass(config, training.eval_batch_size, max(row_lengths(data.held_out)))


def _arguments(training: TrainingSection, checkpoints: Path, eval_batch_size: int, passes: int) -> Any:
    """Return SFTTrainer's arguments for a trial whose batches take so many forward passes each."""
    from trl.trainer.sft_config import SFTConfig

    precision, on_cpu = resolve_precision(training), not torch.cuda.is_available()
    return SFTConfig(
        output_dir=str(checkpoints),
        max_steps=training.steps or -1,
        num_train_epochs=training.epochs or 1.0,
        per_device_train_batch_size=training.batch_size // passes,
        per_device_eval_batch_size=eval_batch_size,
        gradient_accumulation_steps=training.accumulation * passes,
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
        # Routers are not trained. With their loss on, generation and families without experts fail (transformers 5.23).
        router_aux_loss_coef=0.0,
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
        data_seed=training.seed,  # otherwise the process's seed, which other trials set too, orders the rows
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        tf32=None if on_cpu else training.tf32,
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        logging_nan_inf_filter=False,  # the filter would hide NaN
        disable_tqdm=True,
        report_to=[],
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},  # rows already have ids and labels
    )


def _schedule_options(training: TrainingSection) -> dict[str, Any]:
    """Return the arguments of transformers' schedule function besides warmup and steps (5.23, `optimization.py`)."""
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
