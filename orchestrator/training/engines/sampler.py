"""The order of training rows in batches of similar length. It depends only on the trial's seed and the epoch."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch


class LengthGroupedSampler(torch.utils.data.Sampler[int]):  # type: ignore[misc]  # mypy skips torch
    """Yields row numbers so that each optimizer step holds rows of similar length.

    transformers has a sampler for the same purpose (5.23, `trainer_pt_utils.py`), which draws from the process's random
    state. That state differs after a resume, and when other trials run in the process. Rows would repeat, and others
    would never be seen. The grouping itself is transformers'.
    """

    def __init__(self, lengths: Sequence[int], step_rows: int, seed: int) -> None:
        """
        Args:
            lengths: tokens of each row.
            step_rows: rows of an optimizer step.
            seed: the trial's seed.
        """
        self._lengths = lengths
        self._step_rows = step_rows
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next. accelerate's loader and transformers' loop call this."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        from transformers.trainer_pt_utils import get_length_grouped_indices

        # Mixed rather than added: the second epoch of seed 0 must differ from the first epoch of seed 1.
        (mixed,) = np.random.SeedSequence((self._seed, self._epoch)).generate_state(1, np.uint64).tolist()
        generator = torch.Generator().manual_seed(mixed)
        return iter(get_length_grouped_indices(self._lengths, self._step_rows, generator=generator))


def row_lengths(dataset: Any) -> list[int]:
    """Return the number of tokens of each row of a `datasets.Dataset` with a column input_ids."""
    column = dataset.with_format("arrow")[:].column("input_ids").combine_chunks()
    lengths: list[int] = column.value_lengths().to_pylist()
    return lengths
