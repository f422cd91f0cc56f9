"""TensorBoard event files: scalars, and hparams in the same run, so that a sweep reads as one HParams table."""

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from orchestrator.record import MetricPoint, TrialResult
from orchestrator.tracking.protocol import TrialIdentity


class TensorBoardTracker:
    """One run a trial. Hparams are written at the start, so that a stopped trial has its row too."""

    name = "TensorBoard"

    def __init__(self, identity: TrialIdentity) -> None:
        # purge_step hides what a lost worker had written past the checkpoint.
        purge = identity.resumed_step + 1
        self._writer = SummaryWriter(str(identity.paths.tensorboard), purge_step=purge, flush_secs=10)
        varied = identity.config.varied or {
            "lora.rank": identity.config.lora.rank,
            "training.learning_rate": identity.config.training.learning_rate,
        }
        shown = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in varied.items()}
        # SummaryWriter.add_hparams would open a second run; these are the three records it writes there.
        for record in hparams(shown, dict.fromkeys(("eval/loss", identity.metric), 0.0)):
            self._writer.file_writer.add_summary(record)

    def log(self, point: MetricPoint) -> None:
        for name, value in point.values.items():
            self._writer.add_scalar(name, value, point.step)
        self._writer.add_scalar("progress/tokens", point.tokens, point.step)
        self._writer.flush()

    def finish(self, result: TrialResult) -> None:
        if result.best:
            self._writer.add_scalar(f"best/{result.metric}", result.best.value, result.best.step)
        self._writer.close()
