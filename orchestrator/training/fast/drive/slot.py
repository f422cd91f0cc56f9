"""Drives a trial in a slot: holds an SFTTrainer, which is built but not run, and makes its steps in the engine.

The trainer provides the order of batches, the schedule, callbacks, arguments and state. Its own loop never runs; its
model on the host holds a copy of the adapter for code that saves it. Callbacks get the events of transformers'
`Trainer._inner_training_loop` (5.23) in the same order, except those within a step: gradients and update of a step are
one graph.
"""

import copy
import math
import shutil
import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_callback import ExportableState

from orchestrator.adapters.bundle import Adapter
from orchestrator.record import RowScores
from orchestrator.record.files import building_beside, publish
from orchestrator.spec import TrialConfig
from orchestrator.training.fast.drive.answers import Answering, ask
from orchestrator.training.fast.drive.multi_lora import Batch, TrialSteps
from orchestrator.training.fast.drive.slot_settings import compared, held_settings
from orchestrator.training.fast.drive.slot_view import SlotView
from orchestrator.training.fast.step.adapters import lora_parameters
from orchestrator.training.fast.step.engine import AHEAD, Engine, EvaluationBatch, Pending
from orchestrator.training.fast.step.flat_batch import TokenizedRows, as_int32
from orchestrator.training.finite import require_finite
from orchestrator.training.model.patterns import layer_alphas, layer_ranks
from orchestrator.training.model.peft_model import load_adapter_weights
from orchestrator.training.model.readback import read_back, set_rate
from orchestrator.training.questions import Questions
from orchestrator.training.write_queue import WriteQueue


class Slot:
    """Drives one trial. At evaluations, at saves and at the end, the trainer's model on the host holds the adapter."""

    def __init__(
        self,
        index: int,
        trainer: Any,
        engine: Engine,
        config: TrialConfig,
        train: TokenizedRows,
        held_out: TokenizedRows,
        write_queue: WriteQueue,
        questions: Questions | None = None,
    ) -> None:
        """
        Args:
            index: number of the slot in the engine.
            trainer: an SFTTrainer for this trial, whose optimizer is AdamW.
            engine: makes the steps.
            config: the trial.
            train: rows of the trainer's data set.
            held_out: rows to evaluate on.
            write_queue: writes checkpoints.
            questions: the prompts that the trial answers; None for none.
        """
        self._index = index
        self.trainer = trainer
        self._engine = engine
        self._config = config
        self._rows = train
        self._held_out = held_out
        self._write_queue = write_queue
        self._questions = questions
        self._parameters = lora_parameters(trainer.model)
        layers = [name.removesuffix(".lora_A") for name in self._parameters if name.endswith(".lora_A")]
        self._ranks, self._alphas = layer_ranks(config.lora, layers), layer_alphas(config.lora, layers)
        self._rank = max(self._ranks.values(), default=config.lora.rank)
        self._view = SlotView(engine.adapters, index, self._rank, self._parameters)
        self._pending: deque[tuple[int, list[Pending]]] = deque()
        self._losses: list[float] = []
        self._rate_to_log: float | None = None
        """Learning rate of the last step, where that step is still to be logged."""
        self._hits = 0.0
        self._norm = math.nan
        self._num_tokens = 0
        self._num_targets = 0
        self._scores = RowScores(losses=[], hits=[], tokens=[])
        self._lacks_answers = False
        """Whether the trial was asked to end while the last evaluation generated answers."""
        self._copied_at: int | None = None
        self._optimizer_steps = 0

    def train(self, checkpoint: str | None, evaluates_first: bool = False) -> TrialSteps:
        """Train to the last step or until a callback stops the trial; see `engines.loop.Loop`."""
        batches, start = self.begin(checkpoint), time.monotonic()
        trainer, first = self.trainer, self.trainer.state.global_step
        if evaluates_first:
            yield from self._evaluate()
            if trainer.control.should_training_stop or first == trainer.state.max_steps:
                return
        for epoch, batch in batches:
            if self._rate_to_log is None:
                self._call("on_step_begin")  # before the batch is sent: a clock that was stopped restarts here
                parts = yield batch
            else:
                # The host waits for the last step's metrics and logs them while the device computes this step. If this
                # step fails, they are not logged: the next attempt begins at a checkpoint before them.
                parts = yield batch
                self._log()
                self._call("on_step_begin")
            self.sent(batch, parts)
            rate = trainer.optimizer.param_groups[0]["lr"]
            trainer.lr_scheduler.step()
            trainer.state.global_step += 1
            trainer.state.epoch = epoch
            self._call("on_step_end")
            if trainer.control.should_log:
                self._rate_to_log = rate
            if trainer.control.should_evaluate or trainer.control.should_save:
                self._log()
            if trainer.control.should_evaluate:
                yield from self._evaluate()
            if trainer.control.should_save:
                self._save()
        self.collect()
        self._copy_to_model()
        steps, seconds = trainer.state.global_step - first, time.monotonic() - start
        trainer.log({"train_runtime": seconds, "train_steps_per_second": steps / seconds})
        self._call("on_train_end")

    def _evaluate(self) -> TrialSteps:
        """Measure the held-out rows, ask the questions if each evaluation does, and call the callbacks."""
        began = time.monotonic()
        self._scores, self._lacks_answers = (yield self.evaluation()), False
        if self._questions is not None and self._questions.at_evaluations:
            answered = yield from ask(self._engine, self._index, self._config.lora, self._questions)
            self._lacks_answers = answered is None
            self._scores = self._scores.model_copy(update={"metrics": answered or {}})
        metrics = {
            "eval_loss": self._scores.loss,
            "eval_mean_token_accuracy": self._scores.token_accuracy,
            "eval_num_tokens": self._num_tokens,
            "eval_runtime": time.monotonic() - began,
        }
        self._copy_to_model()
        self.trainer.log(dict(metrics))
        self._call("on_evaluate", metrics)

    def adapter(self) -> Adapter:
        """Return the adapter that the trainer's model holds, with PEFT's file names."""
        model, parameters = self.trainer.model, self._parameters
        if (names := _names_in_files.get(tuple(parameters))) is None:
            saved = {tensor.data_ptr(): name for name, tensor in Adapter.of(model).weights.items()}
            names = [saved[parameter.data_ptr()] for parameter in parameters.values()]
            _names_in_files[tuple(parameters)] = names
        weights = {name: each.detach() for name, each in zip(names, parameters.values(), strict=True)}
        return Adapter.with_config(weights, model.peft_config["default"])

    def scores(self) -> RowScores | None:
        """Return the last evaluation's scores of each held-out row; None if answers are missing."""
        return None if self._lacks_answers else self._scores

    def answer(self, weights: Mapping[str, torch.Tensor]) -> Answering:
        """Load an adapter in place of the trained one, and have it answer; see `engines.loop.Loop`."""
        assert self._questions is not None
        load_adapter_weights(self.trainer.model, weights)
        self._fill_slot()
        return (yield from ask(self._engine, self._index, self._config.lora, self._questions))

    def read_back(self) -> dict[str, Any]:
        """Return the settings that the slot and its optimizer really hold, by the names of `readback`."""
        adapters, table = self._engine.adapters, self._table(0, 1)
        held = held_settings(adapters, self._index, self._view.matrices(adapters.weights), table, self._config.lora)
        return compared(read_back(self.trainer), held, adapters)

    def begin(self, checkpoint: str | None) -> Iterator[tuple[float, Batch]]:
        """Build loader, state, optimizer and schedule as `Trainer.train` does, and copy the adapter into its slot.

        Args:
            checkpoint: folder to resume from; None begins anew.

        Returns:
            Iterator of (epochs done after the batch, batch).
        """
        trainer = self.trainer
        loader = trainer.get_train_dataloader()
        epochs, updates_per_epoch, _, _, _, batches_per_epoch, max_steps = trainer.set_initial_training_values(
            trainer.args, loader
        )
        if checkpoint is not None:
            trainer._load_from_checkpoint(checkpoint)
        first, skipped = trainer._init_training_state(max_steps, updates_per_epoch, epochs, checkpoint, None)
        # The part of `Trainer._prepare_for_training` that this model needs. The rest walks over the model ten times.
        trainer.create_optimizer(torch.nn.ParameterList(self._parameters.values()))
        trainer.create_scheduler(max_steps)
        if checkpoint is not None:
            trainer._load_optimizer_and_scheduler(checkpoint)
        handler = trainer.callback_handler
        handler.optimizer, handler.lr_scheduler = trainer.optimizer, trainer.lr_scheduler
        handler.train_dataloader = loader
        trainer.optimizer._opt_called = True  # the engine steps, and a schedule warns unless its optimizer has stepped
        if checkpoint is not None:
            set_rate(trainer, self._config.training)
        self._fill_slot()
        self._optimizer_steps = self._view.load_optimizer_states(trainer.optimizer.state)
        trainer.optimizer.state.clear()
        if any(parameter.is_cuda for parameter in self._parameters.values()):
            self._copy_to_model()  # the trainer has moved the parameters to the GPU
        else:
            self._copied_at = self._optimizer_steps
        return self._batches(loader, range(first, epochs), skipped, batches_per_epoch)

    def _fill_slot(self) -> None:
        """Clear the slot, and copy the adapter of the trainer's model into it."""
        adapters = self._engine.adapters
        adapters.clear(self._index)
        adapters.set_patterns(self._index, self._ranks, self._factors())
        weights = self._view.matrices(adapters.weights)
        if missing := self._parameters.keys() - weights.keys():
            raise RuntimeError(f"the slot has no place for layers that PEFT adapts: {missing}")
        for name, parameter in self._parameters.items():
            self._view.load(adapters.weights, name, parameter.detach())

    def _batches(
        self, loader: Any, epochs: range, skipped: int, batches_per_epoch: int
    ) -> Iterator[tuple[float, Batch]]:
        accumulation = self.trainer.args.gradient_accumulation_steps
        self._call("on_train_begin")
        for epoch in epochs:
            self._call("on_epoch_begin")
            loader.set_epoch(epoch)
            order = list(loader.batch_sampler)
            for at in range(skipped, len(order), accumulation):
                micro = order[at : at + accumulation]
                indices = [index for batch in micro for index in batch]
                yield epoch + (at + len(micro)) / batches_per_epoch, self.batch(indices)
                if self.trainer.control.should_epoch_stop or self.trainer.control.should_training_stop:
                    break
            skipped = 0
            self._log()
            self._call("on_epoch_end")
            if self.trainer.control.should_training_stop:
                return

    def batch(self, indices: list[int]) -> Batch:
        """Return the next optimizer step, on the rows of these numbers."""
        table = self._table(self.trainer.state.global_step, self._rows.num_targets(indices))
        return Batch(self._engine, self._index, self._rows, indices, table)

    def evaluation(self) -> EvaluationBatch:
        """Return an evaluation of all held-out rows."""
        return EvaluationBatch(self._engine, self._index, self._held_out, self._table(0, 1))

    def sent(self, batch: Batch, parts: list[Pending]) -> None:
        """Note that a batch is on its way, and read the metrics that have arrived.

        Args:
            batch: the batch.
            parts: metrics of its passes.
        """
        self._optimizer_steps += 1
        self._num_tokens += int(self._rows.lengths[list(batch.indices)].sum())
        self._num_targets += self._rows.num_targets(batch.indices)
        self._pending.append((self.trainer.state.global_step + 1, parts))
        self.collect(wait=False)

    def _table(self, step: int, num_targets: int) -> dict[str, float]:
        """Return the trial's values of `flat_batch.TABLE` at a step.

        Args:
            step: number of earlier steps.
            num_targets: tokens with a loss in the whole batch.
        """
        lora, args, group = self._config.lora, self.trainer.args, self.trainer.optimizer.param_groups[0]
        (beta1, beta2), steps = group["betas"], self._optimizer_steps + 1
        return {
            "key": dropout_key(args.seed, step),
            "threshold": min(round(lora.dropout * DROPOUT_STEPS), DROPOUT_STEPS - 1),
            "keep_scale": 1 / (1 - lora.dropout),
            "scale": lora.scale(lora.rank, lora.alpha),
            "rank": self._rank,
            "loss_weight": 1 / max(1, num_targets),
            "applies": 1,
            "learning_rate": group["lr"],
            "weight_decay": group["weight_decay"],
            "one_minus_beta1": 1 - beta1,
            "one_minus_beta2": 1 - beta2,
            "epsilon": group["eps"],
            "bias_correction1": 1 - beta1**steps,
            "bias_correction2": 1 - beta2**steps,
            "max_norm": args.max_grad_norm or math.inf,
        }

    def _factors(self) -> dict[str, float]:
        """Return the factor of the slot's scale in each adapted layer, by its name."""
        lora = self._config.lora
        own = lora.scale(lora.rank, lora.alpha)
        return {name: lora.scale(rank, self._alphas[name]) / own for name, rank in self._ranks.items()}

    def collect(self, wait: bool = True) -> None:
        """Read the metrics that have arrived, in the order of the steps.

        Args:
            wait: wait for all metrics. Otherwise wait only where the host is more than `AHEAD` steps ahead.
        """
        while self._pending:
            step, parts = self._pending[0]
            if not wait and len(self._pending) <= AHEAD and not all(part.is_ready for part in parts):
                return
            self._pending.popleft()
            metrics = [part.read() for part in parts]
            loss, norm = sum(each.losses[self._index] for each in metrics), metrics[-1].norms[self._index]
            require_finite({"loss": loss, "grad_norm": norm}, step)
            self._losses.append(loss)
            self._norm = norm
            self._hits += sum(each.hits[self._index] for each in metrics)

    def _log(self) -> None:
        """Log the steps up to the last one that was sent, if that is still to be done."""
        learning_rate, self._rate_to_log = self._rate_to_log, None
        if learning_rate is None:
            return
        self.collect()
        if not self._losses:
            return
        self.trainer.log(
            {
                "loss": sum(self._losses) / len(self._losses),
                "grad_norm": self._norm,
                "learning_rate": learning_rate,
                "mean_token_accuracy": self._hits / self._num_targets,
                "num_tokens": self._num_tokens,
            }
        )
        self._losses, self._hits, self._num_targets = [], 0.0, 0

    def _save(self) -> None:
        """Queue the write of a checkpoint as the Trainer writes it: PEFT's files, AdamW's state, schedule, state."""
        trainer = self.trainer
        self._copy_to_model()
        of_bitsandbytes = type(trainer.optimizer).__module__.startswith("bitsandbytes.")
        trainer.optimizer.state.update(self._view.optimizer_states(self._optimizer_steps, of_bitsandbytes))
        optimizer = trainer.optimizer.state_dict()
        trainer.optimizer.state.clear()
        for callback in [*trainer.callback_handler.callbacks, trainer.control]:
            if isinstance(callback, ExportableState):
                trainer.state.stateful_callbacks[type(callback).__name__] = callback.state()
        state, schedule = copy.deepcopy(trainer.state), copy.deepcopy(trainer.lr_scheduler.state_dict())
        adapter = self.adapter()
        folder = Path(trainer.args.output_dir) / f"checkpoint-{state.global_step}"

        def write() -> None:
            with building_beside(folder) as building:
                adapter.save(building)
                torch.save(optimizer, building / "optimizer.pt")
                torch.save(schedule, building / "scheduler.pt")
                trainer._save_rng_state(str(building))
                state.save_to_json(str(building / "trainer_state.json"))
                shutil.rmtree(folder, ignore_errors=True)
                publish(building, folder)

        self._write_queue.do(write)
        self._call("on_save")

    def _copy_to_model(self) -> None:
        """Copy the adapter into the trainer's model, as new tensors that later steps do not change."""
        if self._copied_at == self._optimizer_steps:
            return
        for name, matrix in self._view.on_host(self._engine.adapters.weights).items():
            self._parameters[name].data = matrix
        self._copied_at = self._optimizer_steps

    def _call(self, event: str, *values: Any) -> None:
        trainer = self.trainer
        handler = getattr(trainer.callback_handler, event)
        trainer.control = handler(trainer.args, trainer.state, trainer.control, *values)


_names_in_files: dict[tuple[str, ...], list[str]] = {}
"""Names of parameters -> their names in PEFT's files. PEFT's own lookup takes a third of a second for 16 trials."""

DROPOUT_STEPS = 1 << 31
"""Steps of the dropout rate: 31 random bits decide whether a feature is dropped."""


def dropout_key(seed: int, step: int) -> int:
    """Return the key of a trial's dropout masks at a step, an int32. The masks depend on nothing else of the trial.

    Args:
        seed: `training.seed`.
        step: number of earlier steps.
    """
    mask = 0xFFFFFFFF
    x = (seed * 0x9E3779B9 + 0x7F4A7C15) & mask
    for value in (step, seed >> 32):
        x = ((x ^ value ^ (x >> 16)) * 0x7FEB352D) & mask
        x = ((x ^ (x >> 15)) * 0x846CA68B) & mask
        x ^= x >> 16
    return as_int32(x)
