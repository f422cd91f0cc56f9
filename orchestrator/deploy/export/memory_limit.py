"""Memory: what there is, and how it is said that there is not enough."""

from contextlib import suppress
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
"""Of a container: its own. Limits that are nested deeper, such as SLURM's, are not looked for."""

_LIMITS = (
    ("memory.max", "memory.current", ("active_file", "inactive_file")),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", ("total_active_file", "total_inactive_file")),
)
"""Of cgroups 2 and 1 (Linux, cgroup-v2.rst): the limit, what is taken of it, and what of that is held of files."""

_OUT_OF_MEMORY = ("out of memory", "allocate memory", "not enough memory", "ALLOC_FAILED")
"""How torch, CUDA and cuBLAS say it, where they have no exception of its own."""

_BEYOND_GPUS = "dispatched on the CPU or the disk"
"""In what transformers raises where accelerate finds no room on all GPUs together for a quantised base."""


def why_out_of_memory(error: Exception) -> str | None:
    """What a fault says of memory that ran out; None: it is another fault."""
    import torch

    told = str(error).strip().partition("\n")[0]
    if _BEYOND_GPUS in told:
        return "the GPUs together have no room for the base in its quantised form"
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or any(part in str(error) for part in _OUT_OF_MEMORY):
        return told or type(error).__name__
    return None


def available_bytes() -> int:
    """Memory that can be taken, of this machine and of this container: what the kernel holds of files counted in."""
    from psutil import virtual_memory

    return min([int(virtual_memory().available), *_left_to_container()])


def _left_to_container() -> list[int]:
    """Bytes, where there is a limit."""
    left = []
    for limit, taken, of_files in _LIMITS:
        with suppress(OSError, KeyError, ValueError):  # no such cgroup, no limit, or a sandbox that tells less
            most, file = int((CGROUP / limit).read_text()), CGROUP / taken
            held = dict(line.split() for line in file.with_name("memory.stat").read_text().splitlines())
            left.append(max(0, most - int(file.read_text()) + sum(int(held[name]) for name in of_files)))
    return left


def require_memory(num_bytes: int, what: str) -> None:
    """Raises MemoryError where there is less: the kernel would end the process, which then leaves its files about."""
    if num_bytes > (available := available_bytes()):
        raise MemoryError(f"{what} takes {readable(num_bytes)}, available are {readable(available)}")


def readable(num_bytes: float) -> str:
    """Bytes as a person reads them."""
    return f"{num_bytes / 2**30:.2f} GiB"
