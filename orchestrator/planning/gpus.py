"""GPUs by name: their memory, and the rates by which the time of a step scales from one to another."""

import re
from dataclasses import dataclass

from orchestrator.errors import RequestError

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU."""

    name: str
    title: str
    """The name as a sentence has it."""
    memory_gib: float
    """Memory that a driver reports, rounded down."""
    peak_flops: float
    """Dense bfloat16 products with float32 sums, FLOP/s."""
    bandwidth: float
    """Bytes/s between memory and processors."""
    has_grouped_products: bool
    """Whether grouped products read their sizes on the device, which the fast engine needs for experts. See
    `eligibility.has_grouped_products`: compute capability 9.x and 10.x."""
    is_measured: bool = False
    """Whether the time model was fitted to figures of this GPU. Times on others are scaled by the two rates."""

    @property
    def memory(self) -> int:
        """Memory in bytes."""
        return int(self.memory_gib * GIB)


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("h200", "H200", 139, 989e12, 4.8e12, True, is_measured=True),
        Gpu("h100", "H100 SXM", 79, 989e12, 3.35e12, True),
        Gpu("h100-pcie", "H100 PCIe", 79, 756e12, 2.0e12, True),
        Gpu("a100-80", "A100 SXM 80 GB", 79, 312e12, 2.039e12, False),
        Gpu("a100-40", "A100 SXM 40 GB", 39, 312e12, 1.555e12, False),
        Gpu("l40s", "L40S", 44, 362e12, 0.864e12, False),
        Gpu("a10", "A10", 22, 125e12, 0.6e12, False),
        Gpu("l4", "L4", 22, 121e12, 0.3e12, False),
    )
}
"""Name -> GPU. Rates without sparsity are those of NVIDIA's data sheets: "H200 Tensor Core GPU", "H100 Tensor Core
GPU", "A100 Tensor Core GPU" (80 GB and 40 GB), "L40S", "A10" and "L4" (nvidia.com/en-us/data-center). Where a sheet
gives the rate with sparsity alone, it is halved. The rates of A100 and L40S, and the bandwidths of H200 and L4, were
compared with published copies; bf16 rates of H100 and A10 were not."""

_NAMES_HERE = (
    ("H200", "h200"),
    ("H100 PCIe", "h100-pcie"),
    ("H100", "h100"),
    ("A100-SXM4-80GB", "a100-80"),
    ("A100 80GB", "a100-80"),
    ("A100", "a100-40"),
    ("L40S", "l40s"),
    ("A10", "a10"),
    ("L4", "l4"),
)
"""Part of the name that a driver reports -> `GPUS`; the first that fits."""


def find_gpu(name: str) -> Gpu:
    """Return the GPU of this name.

    Raises:
        RequestError: it is not known.
    """
    if name.lower() in GPUS:
        return GPUS[name.lower()]
    raise RequestError(
        f"--gpu {name}: is not a GPU that plans are made for",
        f"Give one of {', '.join(GPUS)}; without --gpu the plan is for this machine.",
    )


def gpu_here() -> Gpu | None:
    """Return the kind of this machine's first GPU; None without a GPU.

    Raises:
        RequestError: it is not in `GPUS`.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    reported = torch.cuda.get_device_name()
    for part, name in _NAMES_HERE:
        if re.search(rf"\b{part}(?!\d)", reported):
            return GPUS[name]
    raise RequestError(
        f"this machine's GPU, {reported}: its rates are not known, so that no time can be foreseen",
        f"Give --gpu the most similar of {', '.join(GPUS)}.",
    )


def budget_here() -> int:
    """Return the bytes of GPU memory that trials may use on this machine's first GPU."""
    from orchestrator.training.fast.plan.memory_plan import memory_budget

    return memory_budget()
