"""The held-out prompts that trials answer during or after training, and the metrics of their answers."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from orchestrator.adapters.generate import texts_of
from orchestrator.adapters.row_metrics import AnsweredRows, score_rows_by
from orchestrator.data import Prompt
from orchestrator.spec.sections.evaluation import EvaluationSection


class Questions:
    """The prompts of one trial, its metrics, and what its answers have cost so far."""

    def __init__(
        self,
        section: EvaluationSection,
        prompts: Sequence[Prompt],
        tokenizer: Any,
        stop_tokens: list[int],
        searched: str,
        is_stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        """
        Args:
            section: metrics, number of prompts and length of answers.
            prompts: all held-out prompts.
            tokenizer: of the base.
            stop_tokens: ids that end an answer.
            searched: metric by which trials are compared, such as `eval/loss`.
            is_stopping: returns whether the trial is to end now, so that no further token is generated.
        """
        self._metrics = section.metrics
        self._prompts = prompts[: section.rows]
        self._tokenizer = tokenizer
        self.is_stopping = is_stopping
        self.stop_tokens = stop_tokens
        self.max_new_tokens = section.max_new_tokens
        self.at_evaluations = section.is_measured_at_evaluations(searched)
        """Whether each evaluation asks them."""
        self.after_training = bool(section.metrics) and not self.at_evaluations
        """Whether only the best adapter is asked, at the end."""
        self.num_tokens = 0
        """Tokens generated so far in this attempt."""
        self.seconds = 0.0
        """Seconds that the trial has waited for its answers so far in this attempt."""

    @property
    def ids(self) -> list[list[int]]:
        """Token ids of each prompt."""
        return [prompt.ids for prompt in self._prompts]

    def score(self, answers: Sequence[list[int]], seconds: float) -> dict[str, list[float]]:
        """Compute the metrics of answers: name -> a number for each prompt.

        Args:
            answers: token ids of each answer, without the stop token.
            seconds: how long the trial has waited for them.

        Raises:
            MetricError: a user's own metric fails.
        """
        self.num_tokens += sum(map(len, answers))
        self.seconds += seconds
        references = [prompt.answer for prompt in self._prompts]
        rows = AnsweredRows(self._texts_of_prompts, texts_of(self._tokenizer, answers), references)
        return score_rows_by(self._metrics, rows)

    @cached_property
    def _texts_of_prompts(self) -> list[str]:
        return texts_of(self._tokenizer, self.ids)
