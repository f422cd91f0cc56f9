"""Launches that overlap: a kernel is brought onto the device while the one before it still runs, and waits there.

That saves some tenths of a microsecond at each of a step's hundreds of launches. Programmatic dependent launch (CUDA
C++ programming guide) is of Hopper and later; elsewhere a launch is an ordinary one.
"""

import torch
import triton
import triton.language as tl

_HAS_CUDA = torch.cuda.is_available() and torch.version.hip is None

EARLY = tl.constexpr(_HAS_CUDA and torch.cuda.get_device_capability() >= (9, 0))

LAUNCH = {"launch_pdl": bool(EARLY.value)}
"""Options of each launch of a kernel that begins with `after_previous`."""


@triton.jit
def after_previous():
    """Nothing is read or written before this: here the kernel before has ended, and the next may be brought in."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
