"""The record of the winner on the test rows."""

from orchestrator.record.models import Record, RowScores
from orchestrator.record.names import Name


class TestScore(Record):
    """The recommended adapter on the rows of `data.test`, which no decision has seen."""

    __test__ = False  # pytest takes a class of this name for tests

    trial_id: Name
    step: int
    """Optimizer step of the adapter."""
    scores: RowScores
    held_out: dict[str, float]
    """The adapter's metrics on the held-out rows, by which it was chosen."""

    @property
    def optimism(self) -> float:
        """Loss on the test rows minus loss on the held-out rows: what selection and the choice of rows have added."""
        return self.scores.loss - self.held_out["eval/loss"]
