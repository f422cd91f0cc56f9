"""Pickles run code when they are loaded: each place that loads one is known, and its input is signed or own."""

import ast
from pathlib import Path

import orchestrator

LOADS = {"load", "loads", "Unpickler"}
MODULES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "torch"}
KNOWN = {
    "sweep/schedulers/scheduler_state.py",  # from the signed snapshot
    "sweep/search/auto.py",  # from the signed snapshot
    "training/model/rank_change.py",  # tensors of an optimizer, with weights_only
    "sweep/failures.py",  # the error of an attempt, which the driver itself has just written outside the sweep's folder
}


def test_each_place_that_unpickles_is_known() -> None:
    package = Path(orchestrator.__file__).parent
    found = set()
    for file in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in LOADS and isinstance(node.value, ast.Name):
                found |= {str(file.relative_to(package))} if node.value.id in MODULES else set()
    assert found == KNOWN
