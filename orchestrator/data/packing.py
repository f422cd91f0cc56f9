"""Pack several rows into one sequence."""

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Choose which rows share a sequence: best fit, the longest row first (Johnson 1973).

    Args:
        lengths: tokens of each row, at most `capacity`.
        capacity: tokens of a sequence.

    Returns:
        Indices of the rows of each sequence, sorted; sequences are sorted by their first row.
    """
    sequences: list[list[int]] = []
    free_space: list[tuple[int, int]] = []
    """Free tokens and index of each open sequence, sorted."""
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        place = bisect_left(free_space, (lengths[row], -1))
        if place == len(free_space):
            sequences.append([])
            free, sequence = capacity, len(sequences) - 1
        else:
            free, sequence = free_space.pop(place)
        sequences[sequence].append(row)
        if left := free - lengths[row]:
            insort(free_space, (left, sequence))
    return sorted(sorted(rows) for rows in sequences)
