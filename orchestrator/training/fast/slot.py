"""A trial in a slot: it holds an SFTTrainer, built but not run, and steps it in the engine.

The trainer gives the order of batches, the schedule, callbacks, arguments and state; its own loop never runs.
The events are those of transformers' `Trainer._inner_training_loop` (5.23), in the same order, but for those within a
step, whose gradients and update are one graph.
"""

import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import set_seed

from orchestrator.spec import TrialConfig
from orchestrator.training.applied import read_back, same
from orchestrator.training.fast.engine import AHEAD, Engine, Pending
from orchestrator.training.fast.lora import lora_parameters
from orchestrator.training.fast.row import Rows, Span, as_int32
from orchestrator.training.finite import require_finite


class Slot:
    """Drives one trial. The trainer's model is up to date at evaluations and saves, and at the end."""

    def __init__(
        self, index: int, trainer: Any, engine: Engine, config: TrialConfig, train: Rows, held_out: Rows
    ) -> None:
        """
        Args:
            index: of the slot.
            trainer: an SFTTrainer for this trial, whose optimizer is AdamW.
            engine: where it steps.
            config: the trial.
            train: rows of the trainer's data set.
            held_out: rows to evaluate on.
        """
        self._index = index
        self.trainer = trainer
        self._engine = engine
        self._config = config
        self._rows = train
        self._held_out = held_out
        self._parameters = lora_parameters(trainer.model)
        self._pending: deque[tuple[int, list[Pending]]] = deque()
        self._losses: list[float] = []
        self._hits = 0.0
        self._norm = math.nan
        self._num_tokens = 0
        self._num_targets = 0
        self._measured: dict[str, float] = {}
        self._stored_at: int | None = None
        self._optimizer_steps = 0

    def train(self, checkpoint: str | None) -> None:
        """From the start, or from a checkpoint, to the last step, or until a callback stops it."""
        batches, start, first = self.begin(checkpoint), time.time(), self.trainer.state.global_step
        for epoch, indices in batches:
            self._step(epoch, indices)
        self.collect()
        self._store()
        steps, seconds = self.trainer.state.global_step - first, time.time() - start
        self.trainer.log({"train_runtime": seconds, "train_steps_per_second": steps / seconds})
        self._tell("on_train_end")

    def measured(self) -> dict[str, float]:
        """The last evaluation."""
        return self._measured

    def read_back(self) -> dict[str, Any]:
        """What the slot and its optimizer hold, by the names of `applied.expected`."""
        adapters, lora, table = self._engine.adapters, self._config.lora, self._table(0, True, 1)
        matrices = dict(adapters.matrices(self._index, lora.rank, adapters.weights))
        names = {name.rpartition(".")[0] for name in matrices}
        held = {
            "lora.alpha": table["scale"] * lora.rank,
            "lora.dropout": 1 - 1 / table["keep_scale"],
            "lora.target_modules": sorted({name.rpartition(".")[2] for name in names}),
            "lora.num_modules": len(names),
            "training.weight_decay": table["decay"],
            "training.adapter_dtype": str(adapters.weights.dtype).removeprefix("torch."),
            "num_trainable_parameters": sum(matrix.numel() for matrix in matrices.values()),
        }
        live = read_back(self.trainer.model, self.trainer.optimizer)
        # Where model and slot differ both are told, and `applied.compare` refuses them.
        return {
            name: value if same(value, held.get(name, value)) else [value, held[name]] for name, value in live.items()
        }

    def begin(self, checkpoint: str | None) -> Iterator[tuple[float, list[int]]]:
        """Loader, state, optimizer and schedule, as `Trainer.train` would have them, and the adapter into its slot.

        Returns:
            The batches to come: the epochs that are done after each, and its rows.
        """
        trainer, adapters, lora = self.trainer, self._engine.adapters, self._config.lora
        set_seed(trainer.args.seed)  # the loader takes its seed from the process, which other slots share
        loader = trainer.get_train_dataloader()
        epochs, updates_per_epoch, _, _, _, batches_per_epoch, max_steps = trainer.set_initial_training_values(
            trainer.args, loader
        )
        if checkpoint is not None:
            trainer._load_from_checkpoint(checkpoint)
        first, skipped = trainer._init_training_state(max_steps, updates_per_epoch, epochs, checkpoint, None)
        trainer._prepare_for_training(max_steps, loader, checkpoint)
        trainer.optimizer.step()  # no gradients, no step; a schedule warns unless its optimizer has stepped
        adapters.clear(self._index)
        weights = dict(adapters.matrices(self._index, lora.rank, adapters.weights))
        if weights.keys() != self._parameters.keys():
            raise RuntimeError(f"the slot adapts other layers than PEFT: {weights.keys() ^ self._parameters.keys()}")
        for name, matrix in weights.items():
            matrix.copy_(self._parameters[name].detach())
        moments = trainer.optimizer.state
        for flat, key in ((adapters.moment1, "exp_avg"), (adapters.moment2, "exp_avg_sq")):
            for name, matrix in adapters.matrices(self._index, lora.rank, flat):
                if saved := moments.get(self._parameters[name]):
                    matrix.copy_(saved[key])
                    self._optimizer_steps = int(saved["step"])
        moments.clear()
        return self._batches(loader, range(first, epochs), skipped, batches_per_epoch)

    def _batches(
        self, loader: Any, epochs: range, skipped: int, batches_per_epoch: int
    ) -> Iterator[tuple[float, list[int]]]:
        accumulation = self.trainer.args.gradient_accumulation_steps
        self._tell("on_train_begin")
        for epoch in epochs:
            self._tell("on_epoch_begin")
            loader.set_epoch(epoch)
            order = list(loader.batch_sampler)
            for at in range(skipped, len(order), accumulation):
                micro = order[at : at + accumulation]
                yield epoch + (at + len(micro)) / batches_per_epoch, [index for batch in micro for index in batch]
                if self.trainer.control.should_epoch_stop or self.trainer.control.should_training_stop:
                    break
            skipped = 0
            self._tell("on_epoch_end")
            if self.trainer.control.should_training_stop:
                return

    def _step(self, epoch: float, indices: Sequence[int]) -> None:
        trainer, state = self.trainer, self.trainer.state
        self._tell("on_step_begin")
        self.send(indices)
        learning_rate = trainer.optimizer.param_groups[0]["lr"]
        trainer.lr_scheduler.step()
        state.global_step += 1
        state.epoch = epoch
        self._tell("on_step_end")
        self._act(learning_rate)

    def send(self, indices: Sequence[int]) -> None:
        """Send a batch on its way, in as many passes as it needs, and its update."""
        step = self.trainer.state.global_step
        targets = self._rows.num_targets(indices)
        self._optimizer_steps += 1
        passes = self._rows.batches(indices, self._engine.max_tokens)
        parts, first_token = [], 0
        for number, batch in enumerate(passes):
            table = self._table(step, number == len(passes) - 1, targets)
            span = Span(self._index, self._rows, batch, table, first_token)
            parts.append(self._engine.step([span]))
            first_token += span.num_tokens
        self._num_tokens += first_token
        self._num_targets += targets
        self._pending.append((step + 1, parts))
        self.collect(wait=False)

    def _table(self, step: int, applies: bool, num_targets: int) -> dict[str, float]:
        """This trial's values of `row.TABLE` at a step."""
        lora, args, group = self._config.lora, self.trainer.args, self.trainer.optimizer.param_groups[0]
        beta1, beta2 = group["betas"]
        return {
            "key": dropout_key(args.seed, step),
            "threshold": min(round(lora.dropout * DROPOUT_STEPS), DROPOUT_STEPS - 1),
            "keep_scale": 1 / (1 - lora.dropout),
            "scale": lora.alpha / lora.rank,
            "loss_weight": 1 / max(1, num_targets),
            "applies": int(applies),
            "learning_rate": group["lr"],
            "decay": group["weight_decay"],
            "gain1": 1 - beta1,
            "gain2": 1 - beta2,
            "epsilon": group["eps"],
            "correction1": 1 - beta1 ** max(1, self._optimizer_steps),
            "correction2": 1 - beta2 ** max(1, self._optimizer_steps),
            "max_norm": args.max_grad_norm or math.inf,
        }

    def collect(self, wait: bool = True) -> None:
        """Read the figures that have come, at the latest when the host is as far ahead as it may be."""
        while self._pending:
            step, parts = self._pending[0]
            if not wait and len(self._pending) <= AHEAD and not all(part.is_there for part in parts):
                return
            self._pending.popleft()
            figures = [part.read() for part in parts]
            loss, norm = sum(each.losses[self._index] for each in figures), figures[-1].norms[self._index]
            require_finite({"loss": loss, "grad_norm": norm}, step)
            self._losses.append(loss)
            self._norm = norm
            self._hits += sum(each.hits[self._index] for each in figures)

    def _act(self, learning_rate: float) -> None:
        """Log, evaluate and save where the callbacks ask for it."""
        trainer = self.trainer
        if trainer.control.should_log and (self._losses or self._pending):
            self.collect()
            trainer.log(
                {
                    "loss": sum(self._losses) / len(self._losses),
                    "grad_norm": self._norm,
                    "learning_rate": learning_rate,
                    "mean_token_accuracy": self._hits / self._num_targets,
                    "num_tokens": self._num_tokens,
                }
            )
            self._losses, self._hits, self._num_targets = [], 0.0, 0
        if trainer.control.should_evaluate:
            self.evaluate()
        if trainer.control.should_save:
            self._store()
            self._save()

    def evaluate(self) -> None:
        """Evaluate now, and tell the callbacks."""
        trainer, start = self.trainer, time.monotonic()
        loss, accuracy = self._engine.evaluate(self._held_out, self._index, self._table(0, False, 1))
        self._measured = {"eval/loss": loss, "eval/token_accuracy": accuracy}
        metrics = {
            "eval_loss": loss,
            "eval_mean_token_accuracy": accuracy,
            "eval_num_tokens": self._num_tokens,
            "eval_runtime": time.monotonic() - start,
        }
        self._store()
        trainer.log(dict(metrics))
        self._tell("on_evaluate", metrics)

    def _save(self) -> None:
        """A checkpoint as the Trainer writes it: PEFT's files, AdamW's state, schedule, state."""
        trainer, adapters = self.trainer, self._engine.adapters
        rank, moments = self._config.lora.rank, (adapters.moment1, adapters.moment2)
        for (name, first), (_, second) in zip(
            *(adapters.matrices(self._index, rank, each) for each in moments), strict=True
        ):
            trainer.optimizer.state[self._parameters[name]] = {
                "step": torch.tensor(float(self._optimizer_steps)),
                "exp_avg": first.contiguous(),
                "exp_avg_sq": second.contiguous(),
            }
        trainer._save_checkpoint(trainer.model, None)
        trainer.optimizer.state.clear()
        self._tell("on_save")

    def _store(self) -> None:
        """Bring the trainer's model up to date."""
        if self._stored_at == self.trainer.state.global_step:
            return
        adapters = self._engine.adapters
        for name, matrix in adapters.matrices(self._index, self._config.lora.rank, adapters.weights):
            self._parameters[name].data.copy_(matrix)
        self._stored_at = self.trainer.state.global_step

    def _tell(self, event: str, *values: Any) -> None:
        trainer = self.trainer
        handler = getattr(trainer.callback_handler, event)
        trainer.control = handler(trainer.args, trainer.state, trainer.control, *values)


DROPOUT_STEPS = 1 << 31
"""Dropout's rate in this many parts: 31 random bits decide."""


def dropout_key(seed: int, step: int) -> int:
    """Key of a trial's dropout masks at a step, an int32: all that the masks know of the trial."""
    mask = 0xFFFFFFFF
    x = (seed * 0x9E3779B9 + 0x7F4A7C15) & mask
    for value in (step, seed >> 32):
        x = ((x ^ value ^ (x >> 16)) * 0x7FEB352D) & mask
        x = ((x ^ (x >> 15)) * 0x846CA68B) & mask
        x ^= x >> 16
    return as_int32(x)
