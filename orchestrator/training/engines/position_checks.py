"""Rows and prompts beyond the positions of the base: an error where the base fails on them, a warning elsewhere."""

from typing import Any

import numpy as np

from orchestrator.data.long_rows import REMEDY, describe_long_rows
from orchestrator.errors import TrialError
from orchestrator.positions import fails_beyond_limit, independent_length, position_limit
from orchestrator.spec import TrialConfig
from orchestrator.training.engines.trial_inputs import TrialInputs
from orchestrator.training.fast.step.flat_batch import TokenizedRows


def check_positions(config: TrialConfig, inputs: TrialInputs) -> list[str]:
    """Compare a trial's rows with the positions of its base.

    Returns:
        Warnings: rows are beyond the limit, but the base computes their positions; or a row's loss in training depends
        on the longest row of its batch.

    Raises:
        TrialError: the base would fail on a row, or on an answer that `evaluation` asks for.
    """
    base, name, warnings = inputs.base, config.base.model, []
    limit, independent = position_limit(base.config), independent_length(base.config)
    shortest = min((each for each in (limit, independent) if each is not None), default=None)
    if shortest is not None and inputs.longest > shortest:  # the longest row may be several packed ones
        lengths = np.concatenate([_lengths(inputs.train), _lengths(inputs.held_out)])
        longest = int(lengths.max())
        if limit is not None and longest > limit:
            sentence = describe_long_rows(int((lengths > limit).sum()), len(lengths), longest, limit, name)
            if fails_beyond_limit(base):
                raise TrialError(f"data.max_length={config.data.max_length}: {sentence}, and fails on them", REMEDY)
            warnings.append(f"data.max_length={config.data.max_length}: {sentence}; it was not trained on such rows")
        if independent is not None and longest > independent:
            warnings.append(
                f"base.model {name}: in a batch with a row of more than {independent} tokens, the longest row changes "
                "the positions of all (RoPE scaling); held-out rows are therefore evaluated one by one"
            )
    if limit is not None and config.evaluation.metrics:
        _require_room_for_answers(config, inputs, limit)
    return warnings


def _require_room_for_answers(config: TrialConfig, inputs: TrialInputs, limit: int) -> None:
    """Raise TrialError if a prompt and its longest answer need more positions than the base has a table for."""
    prompts, asked = inputs.data.prompts[: config.evaluation.rows], config.evaluation.max_new_tokens
    longest = max((len(prompt.ids) for prompt in prompts), default=0)
    if longest + asked > limit and fails_beyond_limit(inputs.base):
        raise TrialError(
            f"evaluation.max_new_tokens={asked}: a prompt has {longest} tokens, and prompt and answer have {limit} "
            f"positions on base {config.base.model}",
            "Lower evaluation.max_new_tokens or data.max_length, or set evaluation.metrics: [].",
        )


def _lengths(rows: TokenizedRows) -> Any:
    """Return (rows,) the tokens of each row; packed rows count one by one."""
    return np.concatenate([np.diff(rows.sequence_ends(index), prepend=0) for index in range(len(rows))])
