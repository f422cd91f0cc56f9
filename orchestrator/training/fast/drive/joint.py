"""One engine for all slots: trials step jointly, in passes that hold rows of all of them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from orchestrator.spec import TrialConfig
from orchestrator.training.fast.plan.engine_spec import EngineSpec, evaluation_tokens, longest_sequence, pass_tokens
from orchestrator.training.fast.plan.factory import cached_engine, is_cached, release
from orchestrator.training.fast.plan.memory import MemoryOption
from orchestrator.training.fast.plan.memory_plan import MemoryPlan, Target, feasible_plans, too_large_error
from orchestrator.training.fast.plan.parity import refuse_mismatch, require_parity
from orchestrator.training.fast.step.engine import Engine
from orchestrator.training.fast.step.flat_batch import TokenizedRows
from orchestrator.training.fast.warmup import precompile


def engine_for(
    base: Any,
    configs: Sequence[TrialConfig],
    train: TokenizedRows,
    held_out: TokenizedRows,
    num_slots: int = 1,
    too_large: MemoryOption | None = None,
) -> tuple[Engine, MemoryPlan]:
    """Return the engine for these trials, cached or new, and how it is held. On a GPU it has run its largest step.

    An option that runs out of memory in that step, or as it is compared with transformers, is followed by the next one.

    Args:
        base: the base without adapters.
        configs: the trials, or trials that represent them: the largest of each kind.
        train: rows to train on.
        held_out: rows to evaluate on.
        num_slots: trials at a time.
        too_large: an option that ran out of memory although its probe had succeeded. The new plan needs less.

    Raises:
        TooLargeError: the trials do not fit with any option.
        TrialError: on this base the engine differs from transformers.
    """
    refuse_mismatch(base)
    spec = EngineSpec.of(base, configs, num_slots)
    longest = longest_sequence(spec, train, held_out)
    compute, on_gpu = getattr(torch, configs[0].base.compute_dtype), torch.cuda.is_available()
    for plan in feasible_plans(Target.here(base), spec, configs[0], train, held_out, too_large):
        if not on_gpu:
            engine = cached_engine(base, spec, compute, longest, plan.option, on_gpu)
            require_parity(base, engine, train, held_out)
            return engine, plan
        # Try again where other engines of the base were cached: they may have taken the memory.
        for _ in range(1 + is_cached(base)):
            sizes = pass_tokens(spec, train, plan.option), evaluation_tokens(spec, held_out)
            try:
                engine = cached_engine(base, spec, compute, longest, plan.option, on_gpu)
                precompile.join()
                engine.probe(*sizes)
                require_parity(base, engine, train, held_out)
            except torch.OutOfMemoryError:
                release(base)
            else:
                return engine, replace(plan, measured=engine.peak_bytes)
    raise too_large_error(spec, longest, too_large)
