"""A PEFT adapter folder that any PEFT user can load, with what is needed to know where it came from."""

import copy
import hashlib
import math
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary

from pydantic import ValidationError

from orchestrator.adapters.card import adapter_card
from orchestrator.adapters.stops import write_stops
from orchestrator.base import base_commit
from orchestrator.errors import RecordError
from orchestrator.record import RowScores
from orchestrator.record.files import BUILDING, building_beside, refuse_links
from orchestrator.record.models import Record
from orchestrator.record.versions import installed_versions
from orchestrator.spec import TrialConfig

MANIFEST = "manifest.json"
SCORES = "held_out.json"
"""`RowScores` of the held-out rows at the adapter's step: by these, adapters are compared."""
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
CARD = "README.md"
REQUIRED = (CONFIG, WEIGHTS)

REPLACED = ".replaced-"
"""How the name of an adapter's folder begins while another takes its place."""

PICKLES = frozenset({".bin", ".ckpt", ".dill", ".joblib", ".pickle", ".pkl", ".pt", ".pth"})
"""Endings of files that run code when they are loaded; no bundle has one."""


class Facts(Record):
    """Where a bundle came from, and what was measured with it."""

    format: Literal["adapter", "merged", "gguf", "ray-serve"]
    base: dict[str, Any]
    """`BaseSection` of the base it was trained on: id, revision, quantisation."""
    base_commit: str | None = None
    """Commit of the base that was loaded, where it came from the hub."""
    data_fingerprint: str | None = None
    """Hash of the tokens trained and evaluated on."""
    config: dict[str, Any] | None = None
    """The whole `TrialConfig`; None for an adapter that does not say."""
    versions: dict[str, str]
    """Package -> version where it was made."""
    metrics: dict[str, float]
    """Of the adapter, name -> value on its held-out rows: `eval/loss`, ...; of another form `parity` tells."""
    trial_id: str | None = None
    step: int | None = None
    """Optimizer step of these weights."""
    parity: dict[str, Any] | None = None
    """How near it comes to the adapter on its base, where it is another form of that."""


class FileSum(Record):
    """One file as it was written."""

    sha256: str
    size: int
    """Bytes."""


class Manifest(Record):
    """What `manifest.json` holds."""

    version: Literal[1] = 1
    sha256: str = "0" * 64
    """Of the manifest itself, as it is with zeros here."""
    facts: Facts
    files: dict[str, FileSum]
    """By name relative to the folder, with slashes; all but the manifest itself."""


def seal(folder: Path, facts: Facts) -> None:
    """Write the manifest of a bundle, once all its other files are there.

    Raises:
        RecordError: one of them is a pickle or a symbolic link.
    """
    refuse_links(folder)
    sums = {name: FileSum(sha256=_sha256(path), size=path.stat().st_size) for name, path in _files(folder).items()}
    unsigned = Manifest(facts=facts, files=sums)
    text = (unsigned.model_dump_json(indent=2) + "\n").encode()
    digest = hashlib.sha256(text).hexdigest()
    (folder / MANIFEST).write_bytes(text.replace(unsigned.sha256.encode(), digest.encode(), 1))


def verify(folder: Path) -> Manifest:
    """Check every byte of a bundle against its manifest.

    Raises:
        RecordError: there is no manifest, it is damaged, or a file is missing, changed, extra, a pickle or a symbolic
            link.
    """
    refuse_links(folder)
    manifest, found = read_manifest(folder), _files(folder)
    for name, wanted in manifest.files.items():
        if name not in found or not found[name].is_file():
            raise RecordError(f"{folder / name}: is missing, but {MANIFEST} lists it")
        size = found[name].stat().st_size
        if size != wanted.size or _sha256(found[name]) != wanted.sha256:
            told = f"{wanted.size} bytes, not {size}" if size != wanted.size else "another sha256"
            raise RecordError(f"{folder / name}: has changed since it was saved ({MANIFEST} holds {told})")
    if extra := sorted(found.keys() - manifest.files.keys()):
        raise RecordError(f"{folder / extra[0]}: does not belong here ({MANIFEST} does not list it)")
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """What a bundle says of itself; its other files are not looked at.

    Raises:
        RecordError: there is no manifest, or it is damaged.
    """
    path = folder / MANIFEST
    if not path.is_file():
        what = f"has no {MANIFEST}: nothing says what its files were" if folder.is_dir() else "there is no such folder"
        raise RecordError(f"{folder}: {what}")
    text = path.read_bytes()
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        raise RecordError(f"{path}: is damaged or of another version: {error}") from error
    unsigned = text.replace(manifest.sha256.encode(), b"0" * 64, 1)
    if hashlib.sha256(unsigned).hexdigest() != manifest.sha256:
        raise RecordError(f"{path}: has changed since it was saved (it holds another sha256 of itself)")
    return manifest


@dataclass(frozen=True)
class Origin:
    """The step of a trial that an adapter is of."""

    config: TrialConfig
    trial_id: str
    step: int
    metric: str
    """By which the step was chosen."""
    values: dict[str, float]
    """All that was measured at this step, `metric` among it."""
    data_fingerprint: str
    stop_tokens: list[int]
    """Ids at which its answers are over."""


@dataclass(frozen=True)
class Adapter:
    """An adapter apart from its model, by which it can be written later, when the model trains on or is gone."""

    weights: dict[str, Any]
    """By the names of PEFT's file."""
    config: Any
    """Its `LoraConfig`."""

    @classmethod
    def of(cls, model: Any) -> "Adapter":
        """The one adapter of a `PeftModel`; its tensors are not copied."""
        from peft import get_peft_model_state_dict

        trained = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
        # save_embedding_layers=False: "auto" asks the hub whether the vocabulary grew.
        weights = get_peft_model_state_dict(model, state_dict=trained, save_embedding_layers=False)
        return cls.with_config(weights, model.peft_config["default"])

    @classmethod
    def with_config(cls, weights: dict[str, Any], config: Any) -> "Adapter":
        """With a copy of the model's own `LoraConfig`."""
        config = copy.deepcopy(config)
        config.inference_mode = True
        return cls(weights, config)

    def copied(self) -> "Adapter":
        """The same, which later steps of a model that trains in place do not change."""
        return Adapter({name: tensor.cpu().clone() for name, tensor in self.weights.items()}, self.config)

    def less(self, other: "Adapter") -> "Adapter":
        """This adapter minus another of the same shape, as one of twice the rank: B A - B' A' = [B, -B'] [A; A'].

        The scale of each layer stays: alpha grows with the rank, or with its root (rsLoRA).
        """
        import torch

        config, weights = copy.deepcopy(self.config), dict(self.weights)
        for name, matrix in self.weights.items():
            if ".lora_A." in name:
                weights[name] = torch.cat([matrix, other.weights[name]])
            elif ".lora_B." in name:
                weights[name] = torch.cat([matrix, -other.weights[name]], dim=1)
        grows = math.sqrt(2) if config.use_rslora else 2
        config.r, config.lora_alpha = 2 * config.r, grows * config.lora_alpha
        config.rank_pattern = {name: 2 * rank for name, rank in config.rank_pattern.items()}
        config.alpha_pattern = {name: grows * alpha for name, alpha in config.alpha_pattern.items()}
        return Adapter(weights, config)

    def save(self, folder: Path) -> None:
        """Write the files of `PeftModel.save_pretrained` into a folder that exists."""
        from safetensors.torch import save_file

        whole = {name: tensor.contiguous() for name, tensor in self.weights.items()}
        save_file(whole, folder / WEIGHTS, metadata={"format": "pt"})
        self.config.save_pretrained(str(folder))


def save_adapter(adapter: Adapter, tokenizer: Any, folder: Path, origin: Origin, scores: RowScores) -> None:
    """Write an adapter folder, complete or not at all.

    Args:
        adapter: its weights and PEFT configuration.
        tokenizer: saved beside it.
        folder: replaced if it exists.
        origin: for the card and the manifest.
        scores: of the held-out rows at this step.
    """
    with building_beside(folder) as building:
        _fill(building, adapter, tokenizer, origin, scores)
        _put_in_place(building, folder)


def add_answers(folder: Path, metric: str, answers: list[bool]) -> None:
    """Say in an adapter folder how the adapter answers: its scores, card and manifest are written anew, all or none.

    Args:
        folder: from `save_adapter`.
        metric: by which its step was chosen.
        answers: of each held-out prompt that was answered, whether the answer was the wanted one.

    Raises:
        RecordError: it is not whole: damage must not be sealed.
        OSError: it cannot be written; the folder is as it was.
    """
    facts, scores = verify(folder).facts, read_scores(folder)
    assert scores is not None
    scores = scores.model_copy(update={"answers": answers})
    metrics = facts.metrics | scores.values()
    config = TrialConfig.model_validate(facts.config)
    with building_beside(folder) as building:
        for name, file in _files(folder).items():
            if name not in (SCORES, CARD):
                _link(file, building / name)
        _describe(building, config, facts.model_copy(update={"metrics": metrics}), metric, scores)
        _put_in_place(building, folder)


def _link(file: Path, other: Path) -> None:
    """The same file by another name, so that weights are not written twice; a copy where the disk knows no links."""
    other.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(file, other)
    except OSError:
        shutil.copy2(file, other)


def _put_in_place(building: Path, folder: Path) -> None:
    """Rename a folder that is whole to its own name, which another may have."""
    if not folder.exists():
        building.rename(folder)
        return
    # The record may name it: whatever a kill leaves here, `put_right` finds a whole one.
    replaced = folder.with_name(f"{REPLACED}{folder.name}")
    folder.rename(replaced)
    try:
        building.rename(folder)
    except OSError:
        replaced.rename(folder)
        raise
    shutil.rmtree(replaced, ignore_errors=True)  # what is left of it `put_right` takes away


def put_right(parent: Path) -> None:
    """What one that was killed has left beside its folders: half of a new one, or an old one out of its place."""
    for half in parent.glob(f"{BUILDING}*"):
        shutil.rmtree(half)
    for replaced in parent.glob(f"{REPLACED}*"):
        folder = parent / replaced.name.removeprefix(REPLACED)
        if folder.exists():
            shutil.rmtree(replaced)
        else:
            replaced.rename(folder)


def _fill(building: Path, adapter: Adapter, tokenizer: Any, origin: Origin, scores: RowScores) -> None:
    config = origin.config
    commit = base_commit(config.base)
    # By this PEFT finds the base again as it was, wherever its branch has gone since.
    adapter.config.revision = commit or config.base.revision
    adapter.save(building)
    for name, content in _files_of(tokenizer).items():
        (building / name).parent.mkdir(parents=True, exist_ok=True)
        (building / name).write_bytes(content)
    write_stops(building, origin.stop_tokens, tokenizer)
    (building / "trial.json").write_text(config.model_dump_json(indent=2) + "\n", encoding="utf-8")
    facts = Facts(
        format="adapter",
        base=config.base.model_dump(mode="json"),
        base_commit=commit,
        data_fingerprint=origin.data_fingerprint,
        config=config.model_dump(mode="json"),
        versions=installed_versions(),
        metrics=origin.values,
        trial_id=origin.trial_id,
        step=origin.step,
    )
    _describe(building, config, facts, origin.metric, scores)


_tokenizer_files: WeakKeyDictionary[Any, dict[str, bytes]] = WeakKeyDictionary()


def _files_of(tokenizer: Any) -> dict[str, bytes]:
    """What `save_pretrained` writes of a tokenizer, asked once: it holds Python's lock, and with it the training."""
    if (files := _tokenizer_files.get(tokenizer)) is None:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            paths = [path for path in Path(folder).rglob("*") if path.is_file()]
            files = {str(path.relative_to(folder)): path.read_bytes() for path in paths}
        _tokenizer_files[tokenizer] = files
    return files


def _describe(building: Path, config: TrialConfig, facts: Facts, metric: str, scores: RowScores) -> None:
    """Write what an adapter folder says of itself, the manifest last."""
    assert facts.trial_id is not None
    assert facts.step is not None
    card = adapter_card(config, facts.trial_id, facts.step, metric, facts.metrics)
    (building / SCORES).write_text(scores.model_dump_json() + "\n", encoding="utf-8")
    (building / CARD).write_text(card, encoding="utf-8")
    seal(building, facts)


def verify_adapter(folder: Path) -> None:
    """Check that a folder holds an adapter, and where it has a manifest, every byte.

    Raises:
        RecordError: a file is missing, changed, a symbolic link, or not an adapter's.
    """
    refuse_links(folder)
    if missing := [name for name in REQUIRED if not (folder / name).is_file()]:
        raise RecordError(f"{folder}: is not a PEFT adapter folder ({missing[0]} is missing)")
    if (folder / MANIFEST).is_file():
        verify(folder)


def read_scores(folder: Path) -> RowScores | None:
    """Scores of the held-out rows at the adapter's step, where it holds them.

    Raises:
        RecordError: they are damaged, or not those that were saved.
    """
    path = folder / SCORES
    if not path.is_file():
        return None
    listed = read_manifest(folder).files.get(SCORES) if (folder / MANIFEST).is_file() else None
    if listed is not None and listed.sha256 != _sha256(path):
        raise RecordError(f"{path}: has changed since it was saved ({MANIFEST} holds another sha256)")
    try:
        return RowScores.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        raise RecordError(f"{path}: is damaged or of another version: {error}") from error


def _files(folder: Path) -> dict[str, Path]:
    """A bundle's files but its manifest, by name.

    Raises:
        RecordError: one of them is a pickle.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        # The hub and its client put two things of their own beside what was pushed.
        if name in (MANIFEST, ".gitattributes") or name.startswith(".cache/huggingface/"):
            continue
        if path.is_dir():
            continue
        if path.suffix.lower() in PICKLES:
            raise RecordError(f"{path}: is a pickle by its name, and would run code when it is loaded")
        found[name] = path
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
