"""Free memory of the machine and its container, and errors of memory that ran out."""

from contextlib import suppress
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
"""Root of the cgroup files. In a container these are its own; nested limits, such as SLURM's, are not considered."""

_LIMITS = (
    ("memory.max", "memory.current", ("active_file", "inactive_file")),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", ("total_active_file", "total_inactive_file")),
)
"""For cgroups v2 and v1 (Linux, cgroup-v2.rst): the file of the limit, of the usage, and the keys of cached files."""

_OUT_OF_MEMORY = ("out of memory", "allocate memory", "not enough memory", "ALLOC_FAILED")
"""Parts of messages of torch, CUDA and cuBLAS that mean out of memory, raised as a general exception."""

_BEYOND_GPUS = "dispatched on the CPU or the disk"
"""Part of the message that transformers raises if a quantized base does not fit on all GPUs together."""


def why_out_of_memory(error: Exception) -> str | None:
    """Return a message if the error means that memory ran out; None for any other error."""
    import torch

    message = str(error).strip().partition("\n")[0]
    if _BEYOND_GPUS in message:
        return "the quantized base does not fit on all GPUs together"
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or any(part in str(error) for part in _OUT_OF_MEMORY):
        return message or type(error).__name__
    return None


def available_bytes() -> int:
    """Return the memory available on this machine and in this container, including reclaimable file cache."""
    from psutil import virtual_memory

    return min([int(virtual_memory().available), *_left_to_container()])


def _left_to_container() -> list[int]:
    """Return the bytes left below the container's limit; empty without a limit."""
    left = []
    for limit, usage, cache_keys in _LIMITS:
        with suppress(OSError, KeyError, ValueError):  # no such cgroup, no limit, or a sandbox without statistics
            max_bytes, file = int((CGROUP / limit).read_text()), CGROUP / usage
            statistics = dict(line.split() for line in file.with_name("memory.stat").read_text().splitlines())
            cached = sum(int(statistics[key]) for key in cache_keys)
            left.append(max(0, max_bytes - int(file.read_text()) + cached))
    return left


def require_memory(num_bytes: int, what: str) -> None:
    """Raise MemoryError if less is available.

    Otherwise the kernel could kill the process, which would leave its temporary files behind.
    """
    if num_bytes > (available := available_bytes()):
        raise MemoryError(f"{what} takes {readable(num_bytes)}, but only {readable(available)} is available")


def readable(num_bytes: float) -> str:
    """Format bytes in GiB."""
    return f"{num_bytes / 2**30:.2f} GiB"
