"""How the adapter in a slot answers a trial's questions."""

import time
from collections.abc import Generator
from typing import Any

from orchestrator.spec.sections import LoraSection
from orchestrator.training.fast.drive.multi_lora import Task
from orchestrator.training.fast.step.engine import Engine, GenerationBatch
from orchestrator.training.fast.step.flat_batch import IGNORED, TABLE, TokenizedRows
from orchestrator.training.fast.step.generation import Asked
from orchestrator.training.questions import Questions

Answering = Generator[Task, Any, dict[str, list[float]] | None]
"""Yields what the generation of answers needs, and returns their metrics: name -> a number for each prompt. None if the
trial was asked to end meanwhile, so that answers are missing."""


def ask(engine: Engine, slot: int, lora: LoraSection, questions: Questions) -> Answering:
    """Have the adapter that is in a slot answer the questions, and score its answers.

    Args:
        engine: the engine.
        slot: number of the slot.
        lora: settings of its adapter.
        questions: of the trial.
    """
    began, table = time.monotonic(), dict.fromkeys(TABLE, 0.0)
    table |= {"scale": lora.scale(lora.rank, lora.alpha), "rank": lora.rank}
    rows = TokenizedRows(questions.ids, [[IGNORED] * len(ids) for ids in questions.ids])
    stops = frozenset(questions.stop_tokens)
    asked = Asked(slot, rows, questions.max_new_tokens, stops, table, questions.is_stopping)
    answers = yield GenerationBatch(engine, asked)
    if questions.is_stopping():
        return None
    return questions.score(answers, time.monotonic() - began)
