"""How kernels are launched: each is brought onto the device while the one before it still runs, and waits there.

That saves some tenths of a microsecond at each of a step's hundreds of launches. Programmatic dependent launch (CUDA
C++ programming guide) is of Hopper and later; elsewhere a launch is an ordinary one.
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

_HAS_CUDA = torch.cuda.is_available() and torch.version.hip is None

EARLY = tl.constexpr(_HAS_CUDA and torch.cuda.get_device_capability() >= (9, 0))

FULL = 8
"""Slots of a pack whose tokens alone keep the device busy: its sums are split among fewer programs."""

_MOST_THREADS = 64
"""As many as there are kernels: the one that takes longest is asked for last, and must not wait for its turn."""

_compiled: ContextVar[list[Any] | None] = ContextVar("compiled", default=None)
"""Kernels that are compiled instead of launched."""


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launch a kernel that begins with `after_previous`; within `compiled_together`, have it compiled instead."""
    options["launch_pdl"] = bool(EARLY.value)
    compiled = _compiled.get()
    if compiled is None:
        kernel[grid](*arguments, **options)
    else:
        compiled.append(kernel.warmup(*arguments, grid=grid, **options))


@contextmanager
def compiled_together() -> Iterator[None]:
    """Kernels launched within are not launched but compiled, all at once: their compiler leaves Python to others.

    At the end all are in Triton's cache, and so is what their launches take (up to Triton 3.6 a module of C for each:
    `backends/nvidia/driver.py`, `CudaLauncher`). What kernels would have written is left as it was.
    """
    compiled: list[Any] = []
    token = _compiled.set(compiled)
    try:
        with ThreadPoolExecutor(_MOST_THREADS) as threads:
            with triton.AsyncCompileMode(threads):
                yield
            found = filter(None, compiled)  # none where a hook of Triton's has said that it is there
            # A promise of a kernel, or a kernel where it was there before.
            kernels = (each.result() if isinstance(each, FutureKernel) else each for each in found)
            list(threads.map(_make_launcher, {kernel.hash: kernel for kernel in kernels}.values()))
    finally:
        _compiled.reset(token)


def _make_launcher(kernel: Any) -> None:
    triton.runtime.driver.active.launcher_cls(kernel.src, kernel.metadata)


@triton.jit
def after_previous():
    """Nothing is read or written before this: here the kernel before has ended, and the next may be brought in."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
