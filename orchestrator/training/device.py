"""The device of this process, and the memory held on it."""

import resource

from orchestrator.spec.sections import ResourcesSection

GIB = 2**30


def use_device(resources: ResourcesSection) -> float:
    """Hold to the trial's share of this machine, and say how many GPUs that is (0 on a CPU)."""
    import torch

    if not torch.cuda.is_available():
        torch.set_num_threads(resources.cpus_per_trial)
        return 0.0
    whole = 1 if resources.gpus_per_trial == "auto" else resources.gpus_per_trial
    return whole / resources.trials_per_gpu


def device_name() -> str:
    """Name of this process's GPU, or cpu."""
    import torch

    return str(torch.cuda.get_device_name(0)) if torch.cuda.is_available() else "cpu"


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
        held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return round(held / GIB, 3)
