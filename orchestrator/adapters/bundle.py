"""Bundles: folders that any PEFT user can load, with a manifest of every file and of where the adapter came from."""

import copy
import hashlib
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from orchestrator.adapters.card import adapter_card
from orchestrator.adapters.peft_config import CONFIG
from orchestrator.adapters.stops import write_stops
from orchestrator.adapters.tokenizer_files import tokenizer_files
from orchestrator.base_folder import base_commit
from orchestrator.errors import RecordError
from orchestrator.record import RowScores
from orchestrator.record.checked import read_record
from orchestrator.record.files import (
    BUILDING,
    REPLACED,
    building_beside,
    link_or_copy,
    publish,
    refuse_links,
    sync,
    sync_tree,
)
from orchestrator.record.manifest import MANIFEST, FileChecksum, file_fault, sha256_of
from orchestrator.record.models import Record
from orchestrator.record.versions import installed_versions
from orchestrator.spec import TrialConfig

SCORES = "held_out.json"
"""`RowScores` of the held-out rows at the adapter's step, which adapters are compared by."""
WEIGHTS = "adapter_model.safetensors"
CARD = "README.md"
REQUIRED = (CONFIG, WEIGHTS)

PICKLES = frozenset({".bin", ".ckpt", ".dill", ".joblib", ".pickle", ".pkl", ".pt", ".pth"})
"""Suffixes of files that run code when they are loaded. No bundle contains one."""

Format = Literal["adapter", "merged", "gguf", "ray-serve"]
"""Content of a bundle: a PEFT adapter, a merged model, a GGUF file, or a merged model with a Ray Serve config."""


class Facts(Record):
    """Origin and measurements of a bundle."""

    format: Format
    base: dict[str, Any]
    """`BaseSection` of the base it was trained on: id, revision, quantization, ..."""
    base_commit: str | None = None
    """Commit of the loaded base, if it came from the hub."""
    data_fingerprint: str | None = None
    """Hash of the training and evaluation tokens."""
    config: dict[str, Any] | None = None
    """The whole `TrialConfig`; None if the adapter does not record it."""
    versions: dict[str, str]
    """Package -> version installed when the bundle was made."""
    metrics: dict[str, float]
    """Metric -> value of the adapter on its held-out rows, such as `eval/loss`. Exports are described by `parity`."""
    trial_id: str | None = None
    step: int | None = None
    """Optimizer step of these weights."""
    parity: dict[str, Any] | None = None
    """For an export: how closely its answers match those of the adapter on its base."""
    has_packed_experts: bool = False
    """Whether fused experts of the base were in 4 bits while the adapter trained."""


class Manifest(Record):
    """The content of `manifest.json`."""

    version: Literal[1] = 1
    sha256: str = "0" * 64
    """sha256 of the manifest itself, computed with zeros in this field."""
    facts: Facts
    files: dict[str, FileChecksum]
    """All files except the manifest, by their path relative to the folder, with slashes."""


def seal(folder: Path, facts: Facts) -> None:
    """Write the manifest of a bundle, after all its other files.

    Raises:
        RecordError: a file is a pickle or a symbolic link.
    """
    refuse_links(folder)
    sums = {name: FileChecksum.of(path) for name, path in _files(folder).items()}
    unsigned = Manifest(facts=facts, files=sums)
    text = (unsigned.model_dump_json(indent=2) + "\n").encode()
    digest = hashlib.sha256(text).hexdigest()
    (folder / MANIFEST).write_bytes(text.replace(unsigned.sha256.encode(), digest.encode(), 1))


def verify(folder: Path) -> Manifest:
    """Check every byte of a bundle against its manifest.

    Raises:
        RecordError: there is no manifest, or it is damaged; or a file is missing, changed, not listed, a pickle or a
            symbolic link.
    """
    refuse_links(folder)
    manifest, found = read_manifest(folder), _files(folder)
    for name, listed in manifest.files.items():
        if name not in found:
            raise RecordError(f"{folder / name}: is missing, but {MANIFEST} lists it")
        if fault := file_fault(found[name], listed):
            raise RecordError(f"{folder / name}: {fault}")
    if extra := sorted(found.keys() - manifest.files.keys()):
        raise RecordError(f"{folder / extra[0]}: does not belong here ({MANIFEST} does not list it)")
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Read a bundle's manifest, without checking its other files.

    Raises:
        RecordError: there is no manifest, or it is damaged.
    """
    path = folder / MANIFEST
    if not path.is_file():
        what = (
            f"has no {MANIFEST}, so that its files cannot be checked" if folder.is_dir() else "there is no such folder"
        )
        raise RecordError(f"{folder}: {what}")
    manifest, text = read_record(Manifest, path), path.read_bytes()
    unsigned = text.replace(manifest.sha256.encode(), b"0" * 64, 1)
    if hashlib.sha256(unsigned).hexdigest() != manifest.sha256:
        raise RecordError(f"{path}: has changed since it was saved (its own sha256 does not match)")
    return manifest


@dataclass(frozen=True)
class Origin:
    """The trial and step that an adapter's weights come from."""

    config: TrialConfig
    trial_id: str
    step: int
    metric: str
    """Metric that the step was chosen by."""
    values: dict[str, float]
    """All metrics at this step, including `metric`."""
    data_fingerprint: str
    stop_tokens: list[int]
    """Token ids that end its answers."""
    has_packed_experts: bool = False
    """Whether fused experts of the loaded base are in 4 bits."""


@dataclass(frozen=True)
class Adapter:
    """An adapter's weights and PEFT configuration, independent of the model, so that it can be written later."""

    weights: dict[str, Any]
    """Tensors by their names in PEFT's file."""
    config: Any
    """The adapter's `LoraConfig`."""

    @classmethod
    def of(cls, model: Any) -> "Adapter":
        """Take the adapter of a `PeftModel` that has one adapter. The tensors are not copied."""
        from peft import get_peft_model_state_dict

        trained = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
        # save_embedding_layers=False: with "auto", PEFT queries the hub to see whether the vocabulary grew.
        weights = get_peft_model_state_dict(model, state_dict=trained, save_embedding_layers=False)
        return cls.with_config(weights, model.peft_config["default"])

    @classmethod
    def with_config(cls, weights: dict[str, Any], config: Any) -> "Adapter":
        """Combine weights with a copy of a model's `LoraConfig`."""
        config = copy.deepcopy(config)
        config.inference_mode = True
        return cls(weights, config)

    def copied(self) -> "Adapter":
        """Copy the tensors to the CPU, so that later training steps do not change them."""
        return Adapter({name: tensor.cpu().clone() for name, tensor in self.weights.items()}, self.config)

    def minus(self, other: "Adapter") -> "Adapter":
        """Subtract another adapter of the same shape. The result has twice the rank: B A - B' A' = [B, -B'] [A; A'].

        The scale of each layer stays the same: alpha grows with the rank, or with its square root for rsLoRA.
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
        """Write the same files as `PeftModel.save_pretrained` into an existing folder."""
        from safetensors.torch import save_file

        whole = {name: tensor.contiguous() for name, tensor in self.weights.items()}
        save_file(whole, folder / WEIGHTS, metadata={"format": "pt"})
        self.config.save_pretrained(str(folder))


def save_adapter(adapter: Adapter, tokenizer: Any, folder: Path, origin: Origin, scores: RowScores) -> None:
    """Write an adapter folder, either completely or not at all.

    Args:
        adapter: the weights and the PEFT configuration.
        tokenizer: saved into the same folder.
        folder: target folder; replaced if it exists.
        origin: recorded in the card and the manifest.
        scores: scores of the held-out rows at this step.
    """
    with building_beside(folder) as building:
        _fill(building, adapter, tokenizer, origin, scores)
        _replace_folder(building, folder)


def add_metrics(folder: Path, metric: str, metrics: dict[str, list[float]]) -> None:
    """Add metrics of generated answers to an adapter folder. Scores, card and manifest are rewritten, all or none.

    Args:
        folder: a folder written by `save_adapter`.
        metric: metric that its step was chosen by.
        metrics: name -> a number for each answered held-out prompt.

    Raises:
        RecordError: the folder is incomplete or changed; a new manifest must not hide the damage.
        OSError: the folder cannot be written; it is left unchanged.
    """
    facts, scores = verify(folder).facts, read_scores(folder)
    assert scores is not None
    scores = scores.model_copy(update={"metrics": metrics})
    values = facts.metrics | scores.values()
    config = TrialConfig.model_validate(facts.config)
    with building_beside(folder) as building:
        for name, file in _files(folder).items():
            if name not in (SCORES, CARD):
                (building / name).parent.mkdir(parents=True, exist_ok=True)
                link_or_copy(file, building / name)
        _describe(building, config, facts.model_copy(update={"metrics": values}), metric, scores)
        _replace_folder(building, folder)


def _replace_folder(building: Path, folder: Path) -> None:
    """Rename a completed folder to its final name, replacing an older folder."""
    if not folder.exists():
        publish(building, folder)
        return
    sync_tree(building)
    # The trial's record may name this folder. After a kill at any point, `recover_interrupted_saves` restores one.
    replaced = folder.with_name(f"{REPLACED}{folder.name}")
    folder.rename(replaced)
    try:
        building.rename(folder)
    except OSError:
        replaced.rename(folder)
        raise
    sync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)  # leftovers are removed by `recover_interrupted_saves`


def recover_interrupted_saves(parent: Path) -> None:
    """Clean up after a killed process: remove incomplete folders, and restore a folder that was being replaced."""
    for incomplete in parent.glob(f"{BUILDING}*"):
        shutil.rmtree(incomplete)
    for replaced in parent.glob(f"{REPLACED}*"):
        folder = parent / replaced.name.removeprefix(REPLACED)
        if folder.exists():
            shutil.rmtree(replaced)
        else:
            replaced.rename(folder)


def _fill(building: Path, adapter: Adapter, tokenizer: Any, origin: Origin, scores: RowScores) -> None:
    config = origin.config
    commit = base_commit(config.base)
    # PEFT loads the base at this revision, even if its branch has moved since.
    adapter.config.revision = commit or config.base.revision
    adapter.save(building)
    for name, content in tokenizer_files(tokenizer).items():
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
        has_packed_experts=origin.has_packed_experts,
    )
    _describe(building, config, facts, origin.metric, scores)


def _describe(building: Path, config: TrialConfig, facts: Facts, metric: str, scores: RowScores) -> None:
    """Write scores, card and manifest of an adapter folder, the manifest last."""
    assert facts.trial_id is not None
    assert facts.step is not None
    card = adapter_card(config, facts.trial_id, facts.step, metric, facts.metrics, facts.has_packed_experts)
    (building / SCORES).write_text(scores.model_dump_json() + "\n", encoding="utf-8")
    (building / CARD).write_text(card, encoding="utf-8")
    seal(building, facts)


def has_manifest(folder: Path) -> bool:
    """Return whether a bundle's files can be checked: without a manifest, nothing says that they are those saved."""
    return (folder / MANIFEST).is_file()


def verify_adapter(folder: Path) -> None:
    """Check that a folder is a PEFT adapter; if it has a manifest, check every byte.

    Raises:
        RecordError: a required file is missing, or a file is changed, not listed, a pickle or a symbolic link.
    """
    refuse_links(folder)
    if missing := [name for name in REQUIRED if not (folder / name).is_file()]:
        raise RecordError(f"{folder}: is not a PEFT adapter folder ({missing[0]} is missing)")
    if has_manifest(folder):
        verify(folder)


def read_scores(folder: Path) -> RowScores | None:
    """Read the scores of the held-out rows at the adapter's step; None if the folder does not contain them.

    Raises:
        RecordError: they are damaged, or have changed since they were saved.
    """
    path = folder / SCORES
    if not path.is_file():
        return None
    listed = read_manifest(folder).files.get(SCORES) if (folder / MANIFEST).is_file() else None
    if listed is not None and listed.sha256 != sha256_of(path):
        raise RecordError(f"{path}: has changed since it was saved ({MANIFEST} lists another sha256)")
    return read_record(RowScores, path)


def _files(folder: Path) -> dict[str, Path]:
    """Return a bundle's files except its manifest, by relative path.

    Raises:
        RecordError: a file is a pickle.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        # Added by the hub and by its client, not part of the bundle.
        if name in (MANIFEST, ".gitattributes") or name.startswith(".cache/huggingface/"):
            continue
        if path.is_dir():
            continue
        if path.suffix.lower() in PICKLES:
            raise RecordError(f"{path}: has the suffix of a pickle, which would run code when it is loaded")
        found[name] = path
    return found
