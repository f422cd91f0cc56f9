"""The device of this process, and the memory held on it."""

import resource
import sys

GIB = 2**30


def use_device(threads: int) -> int:
    """Number of GPUs this process sees; where there is none, hold to that many threads."""
    import torch

    gpus = int(torch.cuda.device_count())
    if not gpus:
        torch.set_num_threads(threads)
    return gpus


def reset_peak_memory() -> None:
    """Forget the GPU's peak so far. The peak of a CPU process cannot be reset: it counts earlier trials too."""
    import torch

    for device in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_gib() -> float:
    """Most memory held: on GPUs what torch allocated, on a CPU the process's resident set. GiB."""
    import torch

    devices = torch.cuda.device_count()
    if devices:
        held = sum(int(torch.cuda.max_memory_allocated(device)) for device in range(devices))
    else:
        unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB on Linux
        held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return round(held / GIB, 3)
