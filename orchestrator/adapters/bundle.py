"""A PEFT adapter folder that any PEFT user can load, with what is needed to know where it came from."""

import copy
import hashlib
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.errors import RecordError, RequestError
from orchestrator.spec import TrialConfig

MANIFEST = "manifest.json"
REQUIRED = ("adapter_config.json", "adapter_model.safetensors")

_CARD = """---
library_name: peft
base_model: {base}
tags: [lora, qlora]
---
# LoRA adapter of trial {trial_id}

Step {step}, {metric} {value:.6g}. Rank {rank}, alpha {alpha:g}, dropout {dropout:g}, learning rate {learning_rate:g}.
Trained on the base `{base}` held as {quantization}. `trial.json` holds the whole configuration.

```python
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained("PATH_OF_THIS_FOLDER")
```
"""


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
        config = copy.deepcopy(model.peft_config["default"])
        config.inference_mode = True
        return cls(weights, config)

    def copied(self) -> "Adapter":
        """The same, which later steps of a model that trains in place do not change."""
        return Adapter({name: tensor.cpu().clone() for name, tensor in self.weights.items()}, self.config)

    def save(self, folder: Path) -> None:
        """Write the files of `PeftModel.save_pretrained` into a folder that exists."""
        from safetensors.torch import save_file

        whole = {name: tensor.contiguous() for name, tensor in self.weights.items()}
        save_file(whole, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        self.config.save_pretrained(str(folder))


def save_adapter(
    adapter: Adapter,
    tokenizer: Any,
    folder: Path,
    config: TrialConfig,
    trial_id: str,
    step: int,
    metric: str,
    value: float,
) -> None:
    """Write an adapter folder, complete or not at all.

    Args:
        adapter: its weights and PEFT configuration.
        tokenizer: saved beside it.
        folder: replaced if it exists.
        config: the trial's configuration.
        trial_id: for the card.
        step: optimizer step of these weights.
        metric: name of the metric the step was chosen by.
        value: its value at this step.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".building-"))
    try:
        _fill(building, adapter, tokenizer, config, trial_id, step, metric, value)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    building.chmod(0o755)
    if folder.exists():
        shutil.rmtree(folder)
    building.rename(folder)


def _fill(
    building: Path,
    adapter: Adapter,
    tokenizer: Any,
    config: TrialConfig,
    trial_id: str,
    step: int,
    metric: str,
    value: float,
) -> None:
    adapter.save(building)
    tokenizer.save_pretrained(str(building))
    (building / "trial.json").write_text(config.model_dump_json(indent=2) + "\n", encoding="utf-8")
    card = _CARD.format(
        base=config.base.model,
        trial_id=trial_id,
        step=step,
        metric=metric,
        value=value,
        rank=config.lora.rank,
        alpha=config.lora.alpha,
        dropout=config.lora.dropout,
        learning_rate=config.training.learning_rate,
        quantization=config.base.quantization,
    )
    (building / "README.md").write_text(card, encoding="utf-8")
    sums = {path.name: _sha256(path) for path in sorted(building.iterdir())}
    (building / MANIFEST).write_text(json.dumps({"sha256": sums}, indent=2) + "\n", encoding="utf-8")


def verify_adapter(folder: Path) -> None:
    """Check an adapter folder against its manifest (where it has one).

    Raises:
        RecordError: a file is missing, changed, or not an adapter's.
    """
    if missing := [name for name in REQUIRED if not (folder / name).is_file()]:
        raise RecordError(f"{folder}: is not a PEFT adapter folder ({missing[0]} is missing)")
    if not (folder / MANIFEST).is_file():
        return
    sums = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["sha256"]
    for name, digest in sums.items():
        if not (folder / name).is_file():
            raise RecordError(f"{folder / name}: is missing, but {MANIFEST} lists it")
        if _sha256(folder / name) != digest:
            raise RecordError(f"{folder / name}: has changed since it was saved ({MANIFEST} holds another sha256)")


def export_adapter(adapter: Path, target: Path) -> None:
    """Copy an adapter folder, checked before and after, complete or not at all.

    Raises:
        RequestError: the target exists and is not an empty folder, or cannot be made.
        RecordError: the adapter is not whole.
    """
    verify_adapter(adapter)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RequestError(f"{target}: already exists", "Give a folder that does not exist yet.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(dir=target.parent, prefix=".building-"))
    except OSError as error:
        raise RequestError(f"{target}: cannot be made: {error}") from error
    try:
        shutil.copytree(adapter, building, dirs_exist_ok=True)
        verify_adapter(building)
        building.chmod(0o755)
        building.replace(target)  # over an empty folder too
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
