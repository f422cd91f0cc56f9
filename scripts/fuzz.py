"""Fuzz what reads files of others: experiments, records of sweeps, and bundles.

Each file is damaged at random, byte by byte or value by value, and read. The run fails if anything is raised that is
no `OrchestratorError`, or if one input takes 10 s or 4 GiB. atheris (extra fuzz) guides the damage by the coverage of
the code: `pip install -e '.[fuzz]'`. It has builds for some versions of Python on Linux only.

    python scripts/fuzz.py --seconds 60                  each target for a minute
    python scripts/fuzz.py --target record --seconds 600
    python scripts/fuzz.py --target record INPUT         one input again, such as the file that a failure has left
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

try:
    import atheris
except ImportError as error:
    sys.exit(f"error: atheris cannot be imported: {error}\n  Install it with: pip install -e '.[fuzz]'")

with atheris.instrument_imports(include=["orchestrator"]):
    from orchestrator.adapters.bundle import Facts, read_manifest, read_scores, seal, verify_adapter
    from orchestrator.adapters.peft_config import largest_rank
    from orchestrator.adapters.stops import read_stops
    from orchestrator.deploy.adapter_ref import AdapterRef
    from orchestrator.deploy.serving.vllm import more_than_lora
    from orchestrator.errors import OrchestratorError
    from orchestrator.record import (
        MetricPoint,
        PresentTrials,
        RowScores,
        SweepInfo,
        SweepPaths,
        TrialResult,
        TrialState,
        is_finished,
        read_decisions,
        read_metrics,
        read_sweep,
        totals,
        write_record,
    )
    from orchestrator.record.absent import AbsentAdapter, read_absent, write_absent
    from orchestrator.record.decisions import Decision, append_decision
    from orchestrator.record.faults import Fault, append_fault, read_faults
    from orchestrator.record.models import BestPoint
    from orchestrator.record.requests import read_request, unanswered, write_request
    from orchestrator.spec import load_spec, parse_spec

DOCUMENT: dict[str, Any] = {
    "base": {"model": "embedded"},
    "data": {"source": "embedded", "format": "template", "template": "{question} {answer}"},
    "search": {"space": {"lora.rank": {"choice": [4, 8]}, "training.learning_rate": {"loguniform": [1e-4, 1e-2]}}},
}


class Target:
    """Files with valid content, and the functions that read them."""

    def __init__(self, folder: Path, files: list[str], read: list[Callable[[], object]]) -> None:
        self.folder, self._read = folder, read
        self._whole = {name: (folder / name).read_bytes() for name in files}

    def seeds(self) -> list[bytes]:
        """Return inputs to begin with: each file as it is."""
        return [bytes([0, i]) + content for i, content in enumerate(self._whole.values())]

    def __call__(self, data: bytes) -> None:
        """Damage one file as `data` says, read all, and mend the file."""
        kind, choice, rest = data[:1], data[1:2], data[2:]
        name = [*self._whole][choice[0] % len(self._whole)] if choice else next(iter(self._whole))
        whole = self._whole[name]
        (self.folder / name).write_bytes(_with_other_value(whole, rest) if kind and kind[0] % 2 else rest)
        for each in self._read:
            with suppress(OrchestratorError):
                each()
        (self.folder / name).write_bytes(whole)


def _with_other_value(content: bytes, data: bytes) -> bytes:
    """Replace values of a JSON document, or of its first line, by others."""
    provider = atheris.FuzzedDataProvider(data)
    line, _, others = content.partition(b"\n{")
    document = json.loads(line if others else content)
    for _ in range(provider.ConsumeIntInRange(1, 3)):
        document = _replaced(document, provider)
    return json.dumps(document).encode() + (b"\n{" + others if others else b"\n")


def _replaced(value: Any, provider: Any) -> Any:
    if isinstance(value, dict | list) and value and provider.ConsumeIntInRange(0, 9):
        keys = [*value] if isinstance(value, dict) else [*range(len(value))]
        key = provider.PickValueInList(keys)
        change = provider.ConsumeIntInRange(0, 19)
        if change == 0:
            del value[key]
        elif change == 1 and isinstance(value, dict):
            value[provider.ConsumeUnicode(8)] = _any(provider)
        else:
            value[key] = _replaced(value[key], provider)
        return value
    return _any(provider)


def _any(provider: Any) -> Any:
    some = [
        None,
        True,
        0,
        -1,
        1,
        2**63,
        10**400,
        0.5,
        float("nan"),
        float("inf"),
        "",
        "..",
        "../x",
        "a/b",
        "\0",
        "x" * 999,
    ]
    some += [[], {}, [[]], {"": {}}, [0] * 50, "NaN", "embedded", {"choice": []}, {"uniform": [1, 0]}, "1e999"]
    kind = provider.ConsumeIntInRange(0, len(some) + 3)
    if kind < len(some):
        return some[kind]
    if kind == len(some):
        return provider.ConsumeInt(8)
    return provider.ConsumeFloat() if kind == len(some) + 1 else provider.ConsumeUnicode(12)


def spec_target(folder: Path) -> Target:
    """Return the target of experiment files."""
    (folder / "x.yaml").write_text(json.dumps(DOCUMENT))
    (folder / "all.yaml").write_text(parse_spec(DOCUMENT).model_dump_json())
    files = ["x.yaml", "all.yaml"]
    return Target(folder, files, [lambda name=name: load_spec(folder / name) for name in files])


def record_target(folder: Path) -> Target:
    """Return the target of a sweep's folder."""
    spec, paths = parse_spec(DOCUMENT), SweepPaths(folder)
    counts = {"num_train": 9, "num_held_out": 1, "num_truncated": 0, "num_dropped": 0, "num_shared": 0}
    info = SweepInfo(
        name=paths.name, created="2026-01-01T00:00:00+00:00", spec=spec, is_single_trial=False, data_fingerprint="f",
        versions={}, git_commit=None, **counts,
    )  # fmt: skip
    write_record(paths.sweep, info)
    for trial_id, state in (("a", TrialState.COMPLETE), ("b", TrialState.RUNNING)):
        trial, values = paths.trial(trial_id), {"eval/loss": 0.5}
        result = TrialResult(
            trial_id=trial_id, state=state, config=spec.trial_config({}), metric="eval/loss", mode="min", step=7,
            best=BestPoint(value=0.5, step=7, values=values, adapter="adapters/step-7"),
        )  # fmt: skip
        write_record(trial.config, result.config)
        write_record(trial.result if state is TrialState.COMPLETE else trial.progress, result)
        trial.metrics.write_text(MetricPoint(step=7, tokens=9, time_s=1.0, values=values).model_dump_json() + "\n")
    append_decision(paths, Decision(trial_id="a", step=7, action="stopped", why="rule"))
    append_fault(paths, Fault(trial_id="a", step=7, cause="lost", then="restarts"))
    write_absent(paths, {"b": AbsentAdapter(reason="removed by clean", time=info.created, num_bytes=1, num_kept=1)})
    request = write_request(paths, "stop", trial_id="b")
    files = [str(file.relative_to(folder)) for file in sorted(folder.rglob("*.json*"))]
    reads: list[Callable[[], object]] = [
        lambda: is_finished(read_sweep(folder)),
        lambda: totals(read_sweep(folder).trials()),
        lambda: read_sweep(folder).finished(),
        lambda: PresentTrials(read_sweep(folder)).read(),
        lambda: read_sweep(folder).why_over(),
        lambda: [read_metrics(paths.trial(trial_id)) for trial_id in "ab"],
        lambda: read_decisions(paths),
        lambda: read_faults(paths),
        lambda: read_absent(paths),
        lambda: [read_request(paths, name) for name in unanswered(paths)],
        lambda: read_request(paths, request.name),
        lambda: load_spec(paths.trial("a").config),
    ]
    return Target(folder, files, reads)


def bundle_target(folder: Path) -> Target:
    """Return the target of an adapter folder."""
    config = parse_spec(DOCUMENT).trial_config({})
    (folder / "trial.json").write_text(config.model_dump_json())
    (folder / "adapter_config.json").write_text(json.dumps({"r": 8, "rank_pattern": {"x": 4}, "peft_type": "LORA"}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    (folder / "held_out.json").write_text(RowScores(losses=[1.0], hits=[1], tokens=[2]).model_dump_json())
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    base = config.base.model_dump(mode="json")
    seal(folder, Facts(format="adapter", base=base, config=config.model_dump(mode="json"), versions={}, metrics={}))

    def without_manifest(read: Callable[[Path], object]) -> Callable[[], object]:
        """Read the folder as one without a manifest, which would notice each change first."""

        def run() -> object:
            manifest = folder / "manifest.json"
            content = manifest.read_bytes()
            manifest.unlink()
            try:
                return read(folder)
            finally:
                manifest.write_bytes(content)

        return run

    reads: list[Callable[[], object]] = [
        lambda: read_manifest(folder),
        lambda: verify_adapter(folder),
        *(
            without_manifest(read)
            for read in (
                verify_adapter,
                read_scores,
                read_stops,
                largest_rank,
                more_than_lora,
                lambda path: AdapterRef.of_folder(path, trust_remote_code=False),
            )
        ),
    ]
    return Target(folder, [file.name for file in sorted(folder.glob("*.json"))], reads)


TARGETS = {"spec": spec_target, "record": record_target, "bundle": bundle_target}


def fuzz(name: str, seconds: int, input_file: str | None) -> None:
    """Fuzz one target in this process, which libFuzzer ends."""
    memory = "/dev/shm"  # each input writes a file
    with tempfile.TemporaryDirectory(dir=memory if Path(memory).is_dir() else None) as root:
        folder, corpus = Path(root, "files"), Path(root, "corpus")
        folder.mkdir()
        corpus.mkdir()
        target = TARGETS[name](folder)
        for i, seed in enumerate(target.seeds()):
            (corpus / f"whole-{i}").write_bytes(seed)
            (corpus / f"other-values-{i}").write_bytes(bytes([1, i]) + b"\x01\x02\x03\x04\x05\x06\x07\x08" * 8)
        limits = [f"-max_total_time={seconds}", "-timeout=10", "-rss_limit_mb=4096", "-max_len=65536", "-verbosity=0"]
        given = [input_file] if input_file else [str(corpus)]
        atheris.Setup([sys.argv[0], *limits, "-print_final_stats=1", *given], target)
        atheris.Fuzz()


def main() -> None:
    """Fuzz one target, or each of them in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=TARGETS, help="default: all, one after another")
    parser.add_argument("--seconds", type=int, default=60, help="for each target (default: 60)")
    parser.add_argument("input", nargs="?", help="read this one input again")
    arguments = parser.parse_args()
    if arguments.target is not None:
        fuzz(arguments.target, arguments.seconds, arguments.input)
        return
    for name in TARGETS:
        print(f"{name}: {arguments.seconds} s", flush=True)
        command = [sys.executable, __file__, "--target", name, "--seconds", str(arguments.seconds)]
        if subprocess.run(command, check=False).returncode:
            sys.exit(f"error: {name}: an input was not handled; its file and its error are above")


if __name__ == "__main__":
    main()
