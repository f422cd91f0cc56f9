"""`check`, `schema`, `--help` and `import orchestrator` answer at once: they import no heavy library."""

import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.record import SweepPaths

HEAVY = {"torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "ray", "numpy"}
TRACKERS = {"wandb", "mlflow", "trackio"}
ROOT = Path(__file__).parents[2]
CALLS = [["check", "experiments/demo.yaml", "--json"], ["schema"], ["--help"]]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call[0])
def test_no_heavy_library_is_imported(call: list[str]) -> None:
    done = _run("-X", "importtime", "-m", "orchestrator", *call)
    # Lines such as `import time:  120 |  450 |   yaml.loader`.
    modules = [line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")]
    assert "orchestrator.spec.load" in modules, "the report has the expected format"
    assert {module.partition(".")[0] for module in modules} & (HEAVY | TRACKERS) == set()


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call[0])
def test_the_answer_takes_hardly_longer_than_its_libraries(call: list[str]) -> None:
    """On an idle machine the answer takes 0.3 s, the libraries 0.1 s. A heavy library takes a second and more."""
    libraries, answers = [], []
    for _ in range(5):  # in turns, so that other load on the machine affects both
        libraries.append(_seconds("-c", "import typer, pydantic, yaml; print(1)"))
        answers.append(_seconds("-m", "orchestrator", *call))
    assert min(answers) < 6 * min(libraries)


@pytest.mark.parametrize("command", ["status", "best", "list", "check"])
def test_looking_at_a_sweep_takes_at_most_four_tenths_of_a_second_of_cpu(
    command: str, tmp_path: Path, make_sweep: Callable[..., SweepPaths]
) -> None:
    make_sweep(tmp_path / "s", {f"t{index}": ("COMPLETE", 0.5 + index) for index in range(8)})
    places = {"check": "experiments/demo.yaml", "list": f"--output={tmp_path}"}
    call = ["-m", "orchestrator", command, places.get(command, str(tmp_path / "s"))]
    libraries, answers = [], []
    for _ in range(5):  # in turns, so that other load on the machine affects both
        libraries.append(_cpu_seconds("-c", "import typer, pydantic, yaml; print(1)"))
        answers.append(_cpu_seconds(*call))
    # On a slow machine in terms of the libraries: 3.5 times (list) to 5 times (best, check) without cached bytecode.
    assert min(answers) < max(0.4, 6 * min(libraries))


def test_the_public_api_is_lazy() -> None:
    """`import orchestrator` loads no other module, and `load_spec` no heavy library."""
    code = (
        "import sys, orchestrator\n"
        "print(*(name for name in sys.modules if name.startswith('orchestrator')))\n"
        "from orchestrator import load_spec\n"
        "load_spec('experiments/demo.yaml')\n"
        "print(*sys.modules)"
    )
    first, then = _run("-c", code).stdout.splitlines()
    assert first == "orchestrator"
    assert {module.partition(".")[0] for module in then.split()} & (HEAVY | TRACKERS) == set()


def _seconds(*arguments: str) -> float:
    began = time.perf_counter()
    _run(*arguments)
    return time.perf_counter() - began


def _cpu_seconds(*arguments: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    _run(*arguments)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    return done
