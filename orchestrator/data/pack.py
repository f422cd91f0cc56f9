"""Several rows in one sequence."""

from bisect import bisect_left, insort
from collections.abc import Sequence


def packed(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Which rows go together, in the order of their first: best fit, the longest first (Johnson 1973).

    Args:
        lengths: tokens of each row, at most `most`.
        most: tokens of a sequence.

    Returns:
        Rows of each sequence, in their order.
    """
    sequences: list[list[int]] = []
    room: list[tuple[int, int]] = []
    """Free tokens of each open sequence, and which it is; sorted."""
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        place = bisect_left(room, (lengths[row], -1))
        if place == len(room):
            sequences.append([])
            free, sequence = most, len(sequences) - 1
        else:
            free, sequence = room.pop(place)
        sequences[sequence].append(row)
        if left := free - lengths[row]:
            insort(room, (left, sequence))
    return sorted(sorted(rows) for rows in sequences)
