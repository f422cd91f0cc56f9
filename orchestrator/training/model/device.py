"""The device of this process, and the memory that it has held there."""

import resource
import sys

GIB = 2**30


def use_device(threads: int) -> int:
    """Return the number of GPUs that this process sees; if there are none, limit torch to `threads` CPU threads."""
    import torch

    gpus = int(torch.cuda.device_count())
    if not gpus:
        torch.set_num_threads(threads)
    return gpus


def reset_peak_memory() -> None:
    """Reset the GPUs' memory peaks. A CPU process cannot reset its peak, which includes earlier trials."""
    import torch

    for device in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_gib() -> float:
    """Return the most memory held, in GiB: what torch allocated on GPUs, or the resident set of a CPU process."""
    import torch

    devices = torch.cuda.device_count()
    if devices:
        peak = sum(int(torch.cuda.max_memory_allocated(device)) for device in range(devices))
    else:
        unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return round(peak / GIB, 3)
