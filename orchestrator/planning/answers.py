"""Foresees what the answers cost that trials generate for `evaluation.metrics`: time, and memory of keys and values."""

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.planning.gpus import Gpu
from orchestrator.planning.makespan import PackTimes, TrialSize
from orchestrator.planning.step_time import BF16, PassWork, bucket_tokens, evaluation_seconds
from orchestrator.spec import SweepSpec
from orchestrator.training.fast.families.base_shape import BaseShape
from orchestrator.training.fast.step.generation import CACHE_SHARE

LAYER_S = 1.5e-3
"""Seconds that a layer takes for the next token of all answers, however few they are: generation captures no graphs.
24 ms for 16 layers on an H200 with 16 slow cores (docs/log.md, 2026-11-30)."""


@dataclass(frozen=True)
class AnswerSize:
    """The answers that one trial generates at a time."""

    num_prompts: int
    prompt_tokens: float
    """Mean tokens of a prompt."""
    longest: int
    """Tokens of the longest prompt."""
    new_tokens: int
    """Tokens of an answer. Each answer is counted at its limit: an untrained adapter seldom ends before it."""
    at_evaluations: bool
    """Whether each evaluation generates them; otherwise only the best adapter of a trial that ran to its end does."""

    @classmethod
    def of(cls, spec: SweepSpec, prompts: Sequence[int]) -> "AnswerSize | None":
        """Return what a trial answers; None where there is no metric of answers.

        Args:
            spec: the experiment.
            prompts: tokens of each held-out prompt.
        """
        section = spec.evaluation
        asked = prompts[: section.rows]
        if not section.metrics or not asked:
            return None
        at_evaluations = section.is_measured_at_evaluations(spec.search.metric)
        return cls(len(asked), sum(asked) / len(asked), max(asked), section.max_new_tokens, at_evaluations)

    def seconds(self, times: PackTimes, gpu: Gpu, slots: int) -> float:
        """Return the seconds in which the trials in all slots of an engine answer, at the same time."""
        answers, shape = slots * self.num_prompts, times.shape
        work = PassWork(1, 1, self.prompt_tokens, slots, times.rank, times.adapted)
        prompts = self._pass_seconds(times, gpu, work, int(answers * self.prompt_tokens))
        token = max(shape.layers * LAYER_S, self._pass_seconds(times, gpu, work, answers))
        num_groups = -(-answers * self._positions // max(1, _most_positions(shape, gpu)))
        return prompts + num_groups * self.new_tokens * token

    def cache_bytes(self, shape: BaseShape, gpu: Gpu, slots: int) -> int:
        """Return the bytes of keys and values, in a part of the memory that plans leave free."""
        positions = min(slots * self.num_prompts * self._positions, _most_positions(shape, gpu))
        return positions * _position_bytes(shape)

    @property
    def _positions(self) -> int:
        return self.longest + self.new_tokens

    @staticmethod
    def _pass_seconds(times: PackTimes, gpu: Gpu, work: PassWork, tokens: int) -> float:
        size = bucket_tokens(tokens, work.num_slots)
        passes = PassWork(size, size, work.row_tokens, work.num_slots, work.rank, work.adapted)
        return evaluation_seconds(times.shape, gpu, times.option, passes)


def num_rounds(answers: AnswerSize, sizes: Sequence[TrialSize], num_whole: int) -> int:
    """Return how often trials answer, all trials together.

    Args:
        answers: what each of them answers.
        sizes: the trials.
        num_whole: trials that run to their end.
    """
    return sum(each.evaluations for each in sizes) if answers.at_evaluations else num_whole


def _position_bytes(shape: BaseShape) -> int:
    return 2 * shape.layers * shape.keys * shape.head_size * BF16


def _most_positions(shape: BaseShape, gpu: Gpu) -> int:
    """Return how many tokens the cache may hold (`generation.Generator`)."""
    return gpu.memory // CACHE_SHARE // _position_bytes(shape)
