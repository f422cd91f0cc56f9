"""A distributed experiment orchestrator on Ray for QLoRA fine-tuning.

The public API, with the same steps as the command line:

    from orchestrator import load_spec, run

    spec = load_spec("experiments/demo.yaml", ["search.num_trials=2"])
    sweep = run(spec, name="first")
    print(sweep.trials()[["trial", "state", "value"]])
    model, tokenizer = sweep.best().load()

`resume("runs/first")` continues an interrupted sweep, and `open_sweep("runs/first")` opens one without running it.
Functions are imported at their first use, so `import orchestrator` loads nothing else.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.api import open_sweep, resume, run
    from orchestrator.spec import load_spec

__version__ = "0.1.0"

__all__ = ["__version__", "load_spec", "open_sweep", "resume", "run"]

_MODULES = {
    "load_spec": "orchestrator.spec",
    "open_sweep": "orchestrator.api",
    "resume": "orchestrator.api",
    "run": "orchestrator.api",
}


def __getattr__(name: str) -> Any:
    """Import a function of the public API at its first use."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_MODULES[name]), name)
