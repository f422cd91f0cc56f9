"""`check` and `--help` answer at once: they need none of the heavy libraries."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

HEAVY = {"torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "ray", "numpy"}
TRACKERS = {"wandb", "mlflow", "trackio"}
ROOT = Path(__file__).parents[2]
CALLS = [["check", "experiments/demo.yaml", "--json"], ["schema"], ["--help"]]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call[0])
def test_no_heavy_library_is_imported(call: list[str]) -> None:
    done = _run("-X", "importtime", "-m", "orchestrator.cli", *call)
    # Lines such as `import time:  120 |  450 |   yaml.loader`.
    modules = [line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")]
    assert "orchestrator.spec.load" in modules, "the report is read as it is written"
    assert {module.partition(".")[0] for module in modules} & (HEAVY | TRACKERS) == set()


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call[0])
def test_the_answer_takes_hardly_longer_than_its_libraries(call: list[str]) -> None:
    """On an idle machine 0.3 s, of 0.1. A heavy library takes a second and more."""
    libraries, answers = [], []
    for _ in range(5):  # in turns: what else the machine does meets both
        libraries.append(_seconds("-c", "import typer, pydantic, yaml; print(1)"))
        answers.append(_seconds("-m", "orchestrator.cli", *call))
    assert min(answers) < 6 * min(libraries)


def _seconds(*arguments: str) -> float:
    began = time.perf_counter()
    _run(*arguments)
    return time.perf_counter() - began


def _run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    return done
