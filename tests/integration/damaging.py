"""Damage files in the ways that disks do, for tests."""

from collections.abc import Iterator

BLOCK = 4096
"""Bytes of a file system's block: what a power cut leaves of a file ends at one."""


def damaged_texts(whole: bytes, step: int | None = None) -> Iterator[bytes]:
    """Yield a file's content truncated at 0, at its half and at each block, and with one flipped byte.

    Args:
        whole: the content.
        step: flip each byte at a multiple of it, one at a time; None flips the byte in the middle only.
    """
    if not whole:
        return
    yield from (whole[:end] for end in sorted({*range(0, len(whole), BLOCK), len(whole) // 2}))
    for place in range(0, len(whole), step) if step else [len(whole) // 2]:
        yield whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :]
