"""Make the imports of heavy libraries faster, and list every place with an import side effect.

Side effects at import or at the start of a process, all of them:

- `leave_out_compiler`, `leave_out_wandb` (here): environment and `sys.modules` of a process that trains.
  `sweep.workers.worker` calls both when a worker starts, `training.local` the first for a trial without Ray.
- `importing` (here): the garbage collector is off during heavy imports.
- `use_expandable_segments` (here): setting of torch's CUDA allocator; called when `training.fast.step.engine` is
  imported, because torch reads it when CUDA starts.
- `training.engines.sft.import_trainer`: imports trl and replaces two functions of accelerate by faster ones, for all
  trainers of the process.
- `training.fast.ops.triton.launch`: asks CUDA for the GPU's compute capability, which decides how kernels compile.
- `training.worker.runtime`: freezes the objects that the collector knows (`gc.freeze`) once trials share an engine;
  undone when the engine is dropped.
- `tracking.mlflow`: `MLFLOW_*` defaults and a log level, at its import. `tracking.trackio`: `TRACKIO_DIR`, only during
  the import of trackio.
- `training.local.take_gpus` and `sweep.workers.worker`: `CUDA_VISIBLE_DEVICES`, before CUDA starts.
- `training.fast.shard.group`: the network interface of gloo and NCCL, when a process joins a group.
- `cluster` and `sweep.run`: environment variables and log levels of Ray and Ray Tune, before they start.
  `sweep.search.bohb`: the log level of hpbandster.
"""

import atexit
import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread

_EXIT_TIMEOUT_S = 30.0
"""Seconds that the end of the process waits for imports that still run."""


@contextmanager
def importing() -> Iterator[None]:
    """Turn the garbage collector off in this block.

    Objects that an import creates stay alive, so each collection would scan them again for nothing.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def leave_out_compiler() -> None:
    """Keep torch's compiler out of this process, unless the environment variable is set already.

    bitsandbytes imports the compiler (0.50, `backends/default/ops.py`) for functions that this project's CPU and GPU
    paths do not call. That takes a fifth of the time of all imports. Call it neither in a process that runs other
    people's code nor in one that starts such processes, because they inherit the variable.
    """
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


def leave_out_wandb() -> None:
    """Keep W&B out of this process, which records nothing with it.

    transformers and trl import W&B wherever it is installed (transformers 5.23, `integrations/integration_utils.py`;
    trl 1.16, `extras/profiling.py`). That takes two thirds of the time of trl's import.
    """
    sys.modules.setdefault("wandb", None)  # type: ignore[arg-type]  # None makes `import wandb` raise ImportError


def use_expandable_segments() -> None:
    """Let torch's CUDA allocator grow its segments, unless the environment sets the allocator. Call before CUDA starts.

    The CUDA graphs of all buckets share one memory pool. A segment of fixed size fits one bucket and not the next,
    slightly larger one: after 13 buckets of 16 trials at 1.1B they held 55 GiB, while the largest step takes 27.
    """
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def begin(imports: Callable[[], None]) -> Thread:
    """Run imports in a thread, while this thread waits for other processes.

    Join the thread before anything else imports parts of the same packages: of two threads that import a circle of
    modules from different ends, one sees half-initialized modules.

    The end of the process waits for the thread, because C++ code aborts a process that ends during its imports. The
    wait is limited, because a Ctrl-C can leave Python's import lock taken (3.11), and the thread then never ends.
    """
    thread = Thread(target=imports, name="imports", daemon=True)
    thread.start()
    atexit.register(thread.join, _EXIT_TIMEOUT_S)
    return thread
