"""Launch of kernels: each is brought onto the device while the one before it still runs, and waits there.

    kernel n      |======== runs ========|
    kernel n + 1            |bring in| . . wait . . |======== runs ========|
                                                    ^ gdc_wait returns in `wait_for_previous`

This saves some tenths of a microsecond at each of the hundreds of launches of a step: 0.2 ms of 9.7 at 1.1B on an H200
(docs/log.md, 2026-11-23). Programmatic dependent launch (CUDA C++ programming guide) exists on Hopper and later GPUs;
elsewhere a launch is an ordinary one.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import triton
import triton.language as tl
from triton.runtime._async_compile import FutureKernel


def has_dependent_launch() -> bool:
    """Ask the GPU whether it has programmatic dependent launch: compute capability 9.0 and later, CUDA only."""
    has_cuda = torch.cuda.is_available() and torch.version.hip is None
    return has_cuda and torch.cuda.get_device_capability() >= (9, 0)


# Asked at import, because kernels read it as a global constant when they are compiled.
DEPENDENT_LAUNCH = tl.constexpr(has_dependent_launch())

MANY_SLOTS = 8
"""From this many slots on, their tokens alone keep the device busy, and sums are split among fewer programs."""

_MAX_THREADS = 64
"""Threads that compile: as many as there are kernels. The kernel that takes longest is requested last, and must not
wait for a free thread."""

_compiled: ContextVar[list[Any] | None] = ContextVar("compiled", default=None)
"""Collects kernels that are compiled instead of launched; None where kernels are launched."""


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launch a kernel that begins with `wait_for_previous`. Within `compiled_together`, compile it instead.

    Args:
        kernel: a `triton.jit` function.
        grid: number of programs along each axis.
        arguments: of the kernel.
        options: its `constexpr` arguments and Triton's launch options.
    """
    options["launch_pdl"] = bool(DEPENDENT_LAUNCH.value)
    compiled = _compiled.get()
    if compiled is None:
        kernel[grid](*arguments, **options)
    else:
        compiled.append(kernel.warmup(*arguments, grid=grid, **options))


@contextmanager
def compiled_together() -> Iterator[None]:
    """Compile the kernels that are launched within, all at once, and launch none of them.

    Threads help, because Triton's compiler releases Python's lock. At the end all kernels are in Triton's cache, and so
    are their launchers (up to Triton 3.6 a C module for each: `backends/nvidia/driver.py`, `CudaLauncher`). Tensors
    that kernels would have written are left as they were.
    """
    compiled: list[Any] = []
    token = _compiled.set(compiled)
    try:
        with ThreadPoolExecutor(_MAX_THREADS) as threads:
            with triton.AsyncCompileMode(threads):
                yield
            found = filter(None, compiled)  # None where a hook of Triton has reported the kernel as cached
            # A future of a kernel, or the kernel itself where it was compiled before.
            kernels = (each.result() if isinstance(each, FutureKernel) else each for each in found)
            list(threads.map(_make_launcher, {kernel.hash: kernel for kernel in kernels}.values()))
    finally:
        _compiled.reset(token)


def _make_launcher(kernel: Any) -> None:
    triton.runtime.driver.active.launcher_cls(kernel.src, kernel.metadata)


@triton.jit
def wait_for_previous():
    """Wait until the previous kernel has ended, and let the next one be brought in. Comes before any read or write."""
    if DEPENDENT_LAUNCH:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
