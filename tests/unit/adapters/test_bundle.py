"""Bundles: sealing, verification of every byte, and a model card that the hub can read."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig

from orchestrator.adapters.bundle import (
    Adapter,
    Facts,
    Origin,
    add_metrics,
    read_manifest,
    read_scores,
    recover_interrupted_saves,
    save_adapter,
    seal,
    verify,
)
from orchestrator.adapters.card import adapter_card
from orchestrator.base import load_tokenizer
from orchestrator.base_folder import base_commit
from orchestrator.base_weights import quantization_config
from orchestrator.embedded import BASE_DIR
from orchestrator.errors import RecordError
from orchestrator.record import RowScores
from orchestrator.record.files import BUILDING
from orchestrator.record.versions import installed_versions
from orchestrator.spec import TrialConfig
from orchestrator.spec.sections import BaseSection

VALUES = {"eval/loss": 0.25, "eval/token_accuracy": 0.9, "eval/strange": float("inf")}
COMMIT = "a" * 40


def config_of(**sections: Any) -> TrialConfig:
    data = {"source": "embedded", "format": "template", "template": "<s>[INST] {question} [/INST] {answer} </s>"}
    return TrialConfig.model_validate({"base": {"model": "embedded"}, "data": data} | sections)


def save(folder: Path, config: TrialConfig, tokenizer: Any, has_packed_experts: bool = False) -> Path:
    weights = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 8)}
    origin = Origin(config, "t1", 7, "eval/loss", VALUES, "f" * 64, [2], has_packed_experts)
    scores = RowScores(losses=[2.5], hits=[9], tokens=[10])
    save_adapter(Adapter(weights, LoraConfig(r=2, inference_mode=True)), tokenizer, folder, origin, scores)
    return folder


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(BaseSection(model="embedded"))


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    return save(tmp_path_factory.mktemp("sealed") / "adapter", config_of(), tokenizer)


@pytest.fixture
def bundle(sealed: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(sealed, tmp_path / "adapter"))


def test_the_manifest_lists_every_file_and_the_origin_of_the_adapter(sealed: Path) -> None:
    manifest = verify(sealed)
    assert set(manifest.files) == {path.name for path in sealed.iterdir()} - {"manifest.json"}
    assert {"adapter_model.safetensors", "tokenizer.json", "README.md", "held_out.json"} < set(manifest.files)
    assert manifest.files["trial.json"].size == (sealed / "trial.json").stat().st_size
    facts = manifest.facts
    assert (facts.format, facts.trial_id, facts.step, facts.data_fingerprint) == ("adapter", "t1", 7, "f" * 64)
    assert (facts.base["model"], facts.base["quantization"], facts.base_commit) == ("embedded", "nf4", None)
    assert TrialConfig.model_validate(facts.config) == config_of()
    assert facts.metrics == VALUES
    assert facts.versions == installed_versions()
    assert facts.versions["peft"].startswith("0.")


def test_a_flipped_byte_is_detected_in_every_file(bundle: Path) -> None:
    names = [path.name for path in bundle.iterdir()]
    assert len(names) == 10
    for path in map(bundle.joinpath, names):
        whole = path.read_bytes()
        for at in (0, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with pytest.raises(RecordError, match=f"{path.name}: (has changed|is damaged)"):
                verify(bundle)
        path.write_bytes(whole)
    verify(bundle)


def _flip(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"step": 7', '"step": 8'))


def _nest(folder: Path) -> None:
    (folder / "deep").mkdir()
    (folder / "deep" / ".hidden").touch()


def _rename(folder: Path) -> None:
    (folder / "trial.json").rename(folder / "trial.JSON")


def _link(folder: Path) -> None:
    (folder / "linked").symlink_to(folder.parent)


def _write(name: str, content: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json: is missing"),
        (_rename, "trial.json: is missing"),
        (lambda folder: (folder / "trial.json").write_bytes(b""), "trial.json: has changed .* not 0"),
        (_write("notes.txt", ""), "notes.txt: does not belong here"),
        (_nest, "deep/.hidden: does not belong here"),
        (_link, "linked: is a symbolic link to "),
        (_write("adapter_model.bin", "x"), "adapter_model.bin: has the suffix of a pickle"),
        (_write("optimizer.PT", "x"), "optimizer.PT: has the suffix of a pickle"),
        (_flip, "manifest.json: has changed"),
        (_write("manifest.json", '{"sha256": {}}'), "manifest.json: is damaged or of another version"),
        (_write("manifest.json", "{"), "manifest.json: is damaged"),
        (lambda folder: (folder / "manifest.json").unlink(), "adapter: has no manifest.json"),
        (lambda folder: shutil.rmtree(folder), "adapter: there is no such folder"),
    ],
    ids=lambda value: value.split(":")[0] if isinstance(value, str) else "",
)
def test_each_kind_of_damage_has_its_message(bundle: Path, damage: Callable[[Path], Any], message: str) -> None:
    damage(bundle)
    with pytest.raises(RecordError, match=message):
        verify(bundle)


def test_files_that_the_hub_adds_to_a_download_are_ignored(bundle: Path) -> None:
    (bundle / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    (bundle / ".cache" / "huggingface").mkdir(parents=True)
    (bundle / ".cache" / "huggingface" / "README.md.lock").touch()
    verify(bundle)
    (bundle / ".cache" / "other").touch()
    with pytest.raises(RecordError, match="other: does not belong here"):
        verify(bundle)


def test_a_pickle_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights.pth").touch()
    with pytest.raises(RecordError, match=r"weights\.pth: has the suffix of a pickle"):
        seal(tmp_path, Facts(format="merged", base={"model": "embedded"}, versions={}, metrics={}))
    assert not (tmp_path / "manifest.json").exists()


def test_files_in_folders_are_sealed_too(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "manifest.json").write_text("{}")
    seal(tmp_path, Facts(format="ray-serve", base={"model": "embedded"}, versions={}, metrics={}))
    assert list(verify(tmp_path).files) == ["adapter/manifest.json"]
    (tmp_path / "adapter" / "manifest.json").write_text("[]")
    with pytest.raises(RecordError, match=r"adapter/manifest\.json: has changed"):
        verify(tmp_path)


def test_the_hub_reads_the_card(tmp_path: Path, tokenizer: Any) -> None:
    data = {"source": "openai/gsm8k", "config": "main", "format": "prompt", "held_out": {"share": 0.1}}
    config = config_of(base={"model": "meta-llama/Llama-3.2-1B", "revision": "v1"}, data=data)
    card = ModelCard.load(save(tmp_path / "adapter", config, tokenizer) / "README.md")
    about = card.data.to_dict()
    assert about["library_name"] == "peft"
    assert (about["base_model"], about["base_model_relation"]) == ("meta-llama/Llama-3.2-1B", "adapter")
    assert about["pipeline_tag"] == "text-generation"
    assert about["datasets"] == ["openai/gsm8k"]
    assert about["tags"] == ["lora", "qlora"]
    assert "license" not in about
    assert [(result.metric_type, result.metric_value) for result in card.data.eval_results or []] == [
        ("loss", 0.25),
        ("token_accuracy", 0.9),
    ]
    (result, _) = card.data.eval_results or []
    assert (result.dataset_type, result.dataset_config, result.dataset_split) == ("openai/gsm8k", "main", None)
    assert "`meta-llama/Llama-3.2-1B` at `v1`" in card.text
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["revision"] == "v1"


@pytest.mark.parametrize("is_said", [True, False])
def test_the_card_says_what_transformers_alone_does_with_experts(tmp_path: Path, tokenizer: Any, is_said: bool) -> None:
    """The trial has recorded whether experts were in 4 bits, and answers that come later do not change it."""
    folder = save(tmp_path / "adapter", config_of(), tokenizer, has_packed_experts=is_said)
    for _ in range(2):
        card = (folder / "README.md").read_text()
        assert ("Trained on experts in 4 bits, which transformers alone keeps in 16" in card) == is_said
        assert read_manifest(folder).facts.has_packed_experts == is_said
        add_metrics(folder, "eval/loss", {"exact_match": [1.0]})
    lora = {"target_modules": ["experts"], "dropout": 0}
    card = adapter_card(config_of(lora=lora), "t1", 7, "eval/loss", VALUES)
    assert "Adapted experts: see `target_parameters`" in card


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8", "none"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_code_of_a_card_loads_the_base_as_in_training(quantization: str, dtype: str) -> None:
    base = BaseSection(model="embedded", quantization=quantization, compute_dtype=dtype, double_quant=False)
    card = adapter_card(config_of(base=base.model_dump()), "t1", 7, "eval/loss", VALUES)
    lines = card.partition("```python")[2].partition("```")[0]
    layer = SimpleNamespace(support_avx512bf16_for_cpu=True)
    with (
        patch("peft.AutoPeftModelForCausalLM.from_pretrained") as load,
        patch("transformers.GenerationConfig.from_pretrained", side_effect=lambda name: f"config of {name}"),
    ):
        load.return_value.modules = lambda: [layer, object()]
        exec(lines, {})
    assert load.return_value.generation_config == "config of ID_OR_FOLDER", "it has the stop tokens"
    assert layer.support_avx512bf16_for_cpu is not base.is_4bit
    given, expected = load.call_args.kwargs, quantization_config(base)
    assert given["dtype"] == getattr(torch, dtype)
    assert ("quantization_config" in given) == (expected is not None)
    if expected is not None:
        assert given["quantization_config"].to_dict() == expected.to_dict()


def test_a_card_lists_differences_from_plain_lora(tmp_path: Path, tokenizer: Any) -> None:
    base = {"model": "embedded", "quantization": "int8", "new_tokens": ["<|a|>"]}
    lora = {"dora": True, "rslora": True, "rank_pattern": {"q_proj": 4}, "layers_to_transform": [1, 2]}
    config = config_of(base=base, lora=lora | {"modules_to_save": ["norm"]})
    card = ModelCard.load(save(tmp_path / "adapter", config, tokenizer) / "README.md")
    assert card.data.to_dict()["tags"] == ["lora", "dora"], "8 bits are not QLoRA"
    for text in (
        "loaded with quantization `int8`", "- Variant: DoRA and rsLoRA (alpha / sqrt(rank)).",
        "have their own rank or alpha",
        "- Adapted layers: 1, 2.", "- Fully trained modules: norm.", "- Trained tokens: `<|a|>`; `AutoPeftModel",
    ):  # fmt: skip
        assert text in card.text
    lora = {"init": "olora"}
    card = ModelCard.load(save(tmp_path / "other", config_of(lora=lora), tokenizer) / "README.md")
    assert "- Initialized by olora; the files contain trained minus initial weights, at twice the rank." in card.text


def test_a_card_contains_no_path_of_this_machine(tmp_path: Path, tokenizer: Any) -> None:
    rows, base = tmp_path / "rows.jsonl", tmp_path / "secret" / "my-base"
    config = config_of(
        base={"model": str(base), "quantization": "none"}, data={"source": str(rows), "format": "messages"}
    )
    text = (save(tmp_path / "adapter", config, tokenizer) / "README.md").read_text()
    assert str(tmp_path) not in text
    assert "secret" not in text
    assert "my-base" in text
    about = ModelCard(text).data.to_dict()
    assert {"base_model", "base_model_relation", "datasets"} & about.keys() == set()
    assert about["tags"] == ["lora"]
    (result, _) = ModelCard(text).data.eval_results or []
    assert (result.dataset_type, result.dataset_name) == ("local", "held-out rows of rows.jsonl")


def test_added_answers_are_in_scores_card_and_manifest(bundle: Path) -> None:
    before = verify(bundle)
    add_metrics(bundle, "eval/loss", {"exact_match": [1.0, 1.0, 0.0, 1.0]})
    after = verify(bundle)
    assert after.facts.metrics == before.facts.metrics | {"eval/exact_match": 0.75, "eval/exact_match_stderr": 0.25}
    assert after.facts.model_copy(update={"metrics": {}}) == before.facts.model_copy(update={"metrics": {}})
    changed = {name for name, file in after.files.items() if file != before.files[name]}
    assert (changed, after.files.keys()) == ({"README.md", "held_out.json"}, before.files.keys())
    scores = read_scores(bundle)
    assert scores is not None
    assert (scores.losses, scores.metrics) == ([2.5], {"exact_match": [1.0, 1.0, 0.0, 1.0]})
    results = ModelCard.load(bundle / "README.md").data.eval_results or []
    assert [(each.metric_type, each.metric_value) for each in results] == [
        ("loss", 0.25), ("token_accuracy", 0.9), ("exact_match", 0.75)
    ]  # fmt: skip


def test_answers_that_are_added_again_replace_the_old_ones(bundle: Path) -> None:
    """A trial that was interrupted at its end answers again after a resume."""
    add_metrics(bundle, "eval/loss", {"exact_match": [1.0, 0.0]})
    add_metrics(bundle, "eval/loss", {"exact_match": [1.0, 1.0]})
    scores = read_scores(bundle)
    assert scores is not None
    assert scores.metrics == {"exact_match": [1.0, 1.0]}
    assert verify(bundle).facts.metrics == VALUES | scores.values()
    assert verify(bundle).facts.metrics["eval/exact_match"] == 1


@pytest.mark.parametrize("has_hard_links", [True, False])
def test_adding_answers_does_not_copy_the_weights(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, has_hard_links: bool
) -> None:
    if not has_hard_links:
        monkeypatch.setattr(os, "link", _fails(errno.EPERM))
    (bundle / "additional_chat_templates").mkdir()
    (bundle / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    seal(bundle, facts := read_manifest(bundle).facts)
    weights = bundle / "adapter_model.safetensors"
    before, content = weights.stat().st_ino, weights.read_bytes()
    add_metrics(bundle, "eval/loss", {"exact_match": [1.0]})
    assert verify(bundle).facts.metrics == facts.metrics | {"eval/exact_match": 1}
    assert (weights.stat().st_ino == before, weights.stat().st_nlink) == (has_hard_links, 1)
    assert weights.read_bytes() == content


@pytest.mark.parametrize("operation", ["write_text", "write_bytes", "rename"])
def test_a_bundle_is_unchanged_if_answers_cannot_be_written(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    before, whole = verify(bundle), getattr(Path, operation)

    def until_full(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name.startswith(BUILDING) or path.parent.name.startswith(BUILDING):
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(path, *arguments, **options)

    with monkeypatch.context() as full:
        full.setattr(Path, operation, until_full)
        with pytest.raises(OSError, match="No space left"):
            add_metrics(bundle, "eval/loss", {"exact_match": [1.0]})
    assert verify(bundle) == before
    assert [path.name for path in bundle.parent.iterdir()] == ["adapter"]


def test_leftovers_of_the_replaced_folder_are_removed_later(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network file system may keep files that are open."""
    with monkeypatch.context() as busy:
        busy.setattr(os, "rmdir", _fails(errno.EBUSY))
        add_metrics(bundle, "eval/loss", {"exact_match": [1.0]})
    assert verify(bundle).facts.metrics["eval/exact_match"] == 1.0
    assert len(list(bundle.parent.iterdir())) == 2
    recover_interrupted_saves(bundle.parent)
    assert [path.name for path in bundle.parent.iterdir()] == ["adapter"]


def _fails(number: int) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


def test_answers_are_not_added_to_a_damaged_bundle(bundle: Path) -> None:
    (bundle / "tokenizer.json").write_text("{}")
    with pytest.raises(RecordError, match=r"tokenizer\.json: has changed"):
        add_metrics(bundle, "eval/loss", {"exact_match": [1.0]})
    assert [path.name for path in bundle.parent.iterdir()] == ["adapter"]


def test_the_commit_of_a_base_from_the_hub_is_recorded(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = tmp_path / "models--someone--small"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(COMMIT)
    shutil.copytree(BASE_DIR, cached / "snapshots" / COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    base_commit.cache_clear()
    folder = save(tmp_path / "adapter", config_of(base={"model": "someone/small"}), tokenizer)
    assert verify(folder).facts.base_commit == COMMIT
    assert json.loads((folder / "adapter_config.json").read_text())["revision"] == COMMIT


def test_the_files_of_a_tokenizer_are_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(BaseSection(model="embedded"))
    tokenizer.save_pretrained(tmp_path / "its own")
    first = save(tmp_path / "first", config_of(), tokenizer)
    monkeypatch.setattr(tokenizer, "save_pretrained", None)
    second = save(tmp_path / "second", config_of(), tokenizer)
    files = [path.name for path in (tmp_path / "its own").iterdir()]
    assert "tokenizer.json" in files
    for folder in (first, second):
        assert all((folder / name).read_bytes() == (tmp_path / "its own" / name).read_bytes() for name in files)
