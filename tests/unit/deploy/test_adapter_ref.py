"""Adapter folders: their base and configuration, and invalid folders."""

import re
from pathlib import Path
from typing import Any

import pytest

from orchestrator import resume
from orchestrator.adapters.bundle import Facts, seal
from orchestrator.deploy import open_sweep
from orchestrator.deploy.find import find_adapter, load_adapter
from orchestrator.deploy.scoring.evaluate import find_finalists
from orchestrator.deploy.serving.serve import _find_adapters
from orchestrator.errors import RecordError, RequestError
from orchestrator.spec import parse_spec


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_model.safetensors").touch()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/base", "revision": "c0ffee"}')
    return folder


def write_trial(adapter: Path, document: dict[str, Any], **base: Any) -> None:
    config = parse_spec(document | {"base": {"model": "someone/base", **base}}).trial_config({})
    (adapter / "trial.json").write_text(config.model_dump_json())


def test_the_base_is_pinned_to_the_commit_of_the_training(adapter: Path, document: dict[str, Any]) -> None:
    write_trial(adapter, document, revision="main")
    assert find_adapter(str(adapter), "runs").base.revision == "c0ffee"


def test_a_base_of_unknown_quantization_is_not_quantized(adapter: Path) -> None:
    base = find_adapter(str(adapter), "runs").base
    assert (base.model, base.revision, base.quantization) == ("someone/base", "c0ffee", "none")


def test_code_of_a_base_is_run_only_on_request(adapter: Path, document: dict[str, Any]) -> None:
    write_trial(adapter, document, trust_remote_code=True)
    with pytest.raises(RequestError, match="someone/base brings Python code"):
        find_adapter(str(adapter), "runs")
    assert find_adapter(str(adapter), "runs", trust_remote_code=True).base.trust_remote_code


def test_a_record_of_a_sweep_does_not_allow_the_code_of_its_base(tmp_path: Path, make_sweep: Any) -> None:
    paths = make_sweep(tmp_path / "sweep", {"a": ("COMPLETE", 0.5), "b": ("RUNNING", 0.6)})
    for record in (paths.root / "sweep.json", *paths.root.glob("trials/*/*.json")):
        text = re.sub(r'"trust_remote_code": *false', '"trust_remote_code":true', record.read_text())
        record.write_text(re.sub(r',\s*"crc32": *"\w+"', "", text))
    adapter = paths.trial("a").adapter(7)
    (adapter / "adapter_config.json").write_text("{}")
    seal(adapter, Facts(format="adapter", base={}, versions={}, metrics={}))
    folder = str(paths.root)
    for call in (
        lambda: find_adapter(folder, "runs"),
        lambda: load_adapter(folder),
        lambda: load_adapter(find_adapter(folder, "runs", trust_remote_code=True)),
        lambda: open_sweep(folder).best().load(),
        lambda: find_finalists(folder, "runs", 1),
        lambda: _find_adapters(folder, "runs", 1, trust_remote_code=False),
        lambda: resume(folder),
    ):
        with pytest.raises(RequestError, match="brings Python code, which would run on this machine"):
            call()
    assert find_finalists(folder, "runs", 1, trust_remote_code=True)[0].base.trust_remote_code


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("trial.json", "{", "trial.json: is damaged"),
        ("adapter_config.json", "{", "adapter_config.json: is damaged"),
        ("adapter_config.json", "[]", "adapter_config.json: is damaged: the document is not a JSON object"),
        ("adapter_config.json", '{"base_model_name_or_path": null}', "adapter_config.json: names no base"),
    ],
)
def test_a_damaged_file_is_named(adapter: Path, name: str, text: str, message: str) -> None:
    (adapter / name).write_text(text)
    with pytest.raises(RecordError, match=message):
        find_adapter(str(adapter), "runs")


@pytest.mark.parametrize("name", ["notes.txt", "adapter_config.json", "deep/notes.txt", ".cache/huggingface/notes.txt"])
@pytest.mark.parametrize("sealed", [False, True])
def test_a_symbolic_link_is_rejected_even_if_it_is_not_listed(
    adapter: Path, tmp_path: Path, name: str, sealed: bool
) -> None:
    """One of the links is in the cache of the hub's client, whose files are in no manifest."""
    secret = tmp_path / "secret"
    secret.write_text('{"base_model_name_or_path": "someone/base"}')
    (adapter / name).parent.mkdir(parents=True, exist_ok=True)
    if sealed:
        (adapter / name).write_bytes(secret.read_bytes())
        seal(adapter, Facts(format="adapter", base={}, versions={}, metrics={}))
    (adapter / name).unlink(missing_ok=True)
    (adapter / name).symlink_to(secret)
    with pytest.raises(RecordError, match=rf"{name}: is a symbolic link to {secret}"):
        find_adapter(str(adapter), "runs")


def test_a_name_that_is_too_long_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="is not the name of a sweep"):
        find_adapter("x" * 5000, str(tmp_path))


@pytest.mark.parametrize(
    ("format", "message"),
    [
        ("merged", "vllm serve "),
        ("gguf", "llama-server -m "),
        ("ray-serve", "serve deploy "),
    ],
)
def test_an_export_that_is_not_an_adapter_is_reported_with_its_use(tmp_path: Path, format: Any, message: str) -> None:
    seal(tmp_path, Facts(format=format, base={"model": "embedded"}, versions={}, metrics={}))
    with pytest.raises(
        RecordError, match=f"is an export of format {format}; a sweep or an adapter is needed"
    ) as caught:
        find_adapter(str(tmp_path), "runs")
    assert f"{message}{tmp_path}" in caught.value.remedy


def test_a_whole_model_is_reported(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RecordError, match=r"is a whole model \(config.json\)"):
        find_adapter(str(tmp_path), "runs")
