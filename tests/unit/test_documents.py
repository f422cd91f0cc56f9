"""Documents that were made to exhaust time, memory or the stack are refused at once."""

import resource
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.adapters.bundle import read_manifest, read_scores
from orchestrator.adapters.peft_config import read_peft_config
from orchestrator.adapters.stops import read_stops
from orchestrator.documents import MAX_BYTES, MAX_DEPTH, DocumentError, load_yaml, read_json
from orchestrator.errors import OrchestratorError, RecordError, RequestError, SpecError
from orchestrator.priors.library import read_library
from orchestrator.record import SweepPaths, read_decisions, read_metrics, read_sweep
from orchestrator.spec import load_spec
from orchestrator.spec.load import parse_values

BOMBS = {
    "aliases": "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
    "merged aliases": "a: &a {k: v}\n"
    + "".join(
        f"b{i}: &b{i} {{x: *{'a' if i == 0 else f'b{i - 1}'}, y: *{'a' if i == 0 else f'b{i - 1}'}}}\n"
        for i in range(40)
    ),
    "an alias in itself": "a: &a [*a]\n",
    "deep lists": "a: " + "[" * 200_000,
    "deep mappings": "{a: " * 100_000,
    "deep blocks": "\n".join(" " * i + "a:" for i in range(1000)),
    "deep list blocks": "- " * 100_000,
    "many keys": "".join(f"key{i}: 1\n" for i in range(60_000)),
    "a long text": "a: " + "x" * 2**21,
    "many numbers": f"a: [{'1,' * 500_000}]",
}


@pytest.fixture(autouse=True)
def _cheap() -> Iterator[None]:
    """Check that a test takes little time of the CPU and little memory."""
    began_s, before_kib = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.process_time() - began_s < 3, "a second, with a margin for slow machines"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 300 * 2**10


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS.keys())
def test_a_bomb_is_no_experiment(tmp_path: Path, bomb: str) -> None:
    file = tmp_path / "bomb.yaml"
    file.write_text(bomb)
    with pytest.raises(SpecError, match=f"{file}: "):
        load_spec(file)


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS.keys())
def test_a_bomb_is_no_value(bomb: str) -> None:
    with pytest.raises(SpecError, match=r"--set lora.rank: the value"):
        parse_values([f"lora.rank={bomb}"])


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS.keys())
def test_a_bomb_is_no_library_of_priors(tmp_path: Path, bomb: str) -> None:
    file = tmp_path / "priors.yaml"
    file.write_text(bomb)
    with pytest.raises(RequestError, match="is not a library of priors"):
        read_library(file)


def test_aliases_within_bounds_are_read() -> None:
    text = "a: &a {k: [1, 2]}\nb: *a\nc: {<<: *a, d: &d 5}\ne: *d\n"
    assert load_yaml(text) == {"a": {"k": [1, 2]}, "b": {"k": [1, 2]}, "c": {"k": [1, 2], "d": 5}, "e": 5}
    depth = MAX_DEPTH - 1
    assert load_yaml("[" * depth + "]" * depth)
    with pytest.raises(DocumentError, match=f"more than {MAX_DEPTH} levels"):
        load_yaml("[" * (depth + 1) + "]" * (depth + 1))


def test_json_that_is_too_large_or_too_deep_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    file.write_text("[" * 1_000_000)
    with pytest.raises(DocumentError, match="is nested too deeply"):
        read_json(file)
    file.write_text('{"a": ')
    with pytest.raises(DocumentError, match="is not JSON"):
        read_json(file)
    with file.open("wb") as sparse:
        sparse.truncate(2**40)
    with pytest.raises(DocumentError, match=f"more than {MAX_BYTES // 2**20} MiB"):
        read_json(file)


@pytest.mark.parametrize("content", [b"[" * 200_000, b'{"a":' * 200_000, b"\xff", b"[]", b"1" * 10_000, b"null"])
def test_a_damaged_file_of_an_adapter_is_an_error_of_the_record(tmp_path: Path, content: bytes) -> None:
    for name in ("manifest.json", "held_out.json", "adapter_config.json", "generation_config.json"):
        (tmp_path / name).write_bytes(content)
    for read in (read_manifest, read_scores, read_peft_config, read_stops):
        with pytest.raises(RecordError, match=str(tmp_path)):
            read(tmp_path)


@pytest.mark.parametrize("content", [b"[" * 200_000 + b"\n", b"\xff\n", b"[]\n", b"null\n"])
def test_damaged_records_are_errors_and_damaged_lines_are_left_out(tmp_path: Path, content: bytes) -> None:
    paths = SweepPaths(tmp_path)
    trial = paths.trial("a")
    trial.root.mkdir(parents=True)
    for file in (paths.sweep, paths.decisions, trial.metrics):
        file.write_bytes(content)
    with pytest.raises(OrchestratorError, match=r"sweep\.json: is damaged"):
        read_sweep(tmp_path)
    assert read_decisions(paths) == []
    assert read_metrics(trial) == []
