"""A base as it lies on disk: its weights by name, read one at a time."""

import json
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from orchestrator.adapters.stops import read_stops, stop_ids
from orchestrator.base import base_location, quantization_config, require_folder
from orchestrator.errors import RequestError
from orchestrator.spec.sections import BaseSection

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_KEPT = ("generation_config.json", "tokenizer.model", "*.py")
"""Files that a merged model takes over as they are; `tokenizer.model` is for converters."""


@dataclass(frozen=True)
class BaseFiles:
    """The files of a base, 16 or 32 bits a weight."""

    base: BaseSection
    folder: Path
    files: dict[str, Path]
    """Weight -> safetensors file."""

    @cached_property
    def config(self) -> Any:
        """The model's configuration."""
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(str(self.folder), trust_remote_code=self.base.trust_remote_code)

    def blank(self) -> Any:
        """The model without any weight (all on meta)."""
        import torch
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(self.config, trust_remote_code=self.base.trust_remote_code)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a weight, without reading it."""
        from safetensors import safe_open

        with safe_open(self.files[name], "pt") as file:
            return tuple(file.get_slice(name).get_shape())

    def empty(self, name: str, dtype: Any) -> Any:
        """A weight on meta, as it is once cast to `dtype`; only what is no float is not cast."""
        import torch
        from safetensors import safe_open

        with safe_open(self.files[name], "pt") as file:
            part = file.get_slice(name)
            if not part.get_dtype().startswith(("F", "BF")):
                dtype = file.get_tensor(name).dtype
            return torch.empty(part.get_shape(), dtype=dtype, device="meta")

    def read(self, name: str) -> Any:
        """A weight. Its file is opened for it alone: pages of a mapped file count as memory until it is closed."""
        from safetensors import safe_open

        with safe_open(self.files[name], "pt") as file:
            return file.get_tensor(name)

    def quantised(self) -> dict[str, Any]:
        """Weight -> its layer on meta, of those that `base.load_base` quantises, as transformers chooses them."""
        from bitsandbytes.nn import Linear4bit, Linear8bitLt
        from transformers.quantizers import AutoHfQuantizer

        if self.base.quantization == "none":
            return {}
        model = self.blank()
        quantiser = AutoHfQuantizer.from_config(quantization_config(self.base), pre_quantized=False)
        quantiser.preprocess_model(model=model, device_map=None)
        layers = {
            name: module for name, module in model.named_modules() if isinstance(module, Linear4bit | Linear8bitLt)
        }
        return {f"{name}.weight": module for name, module in layers.items()}

    @property
    def stops(self) -> list[int]:
        """Ids at which the base's own answers are over, as transformers reads them."""
        return read_stops(self.folder) or stop_ids(getattr(self.config.get_text_config(), "eos_token_id", None))

    def copy_rest(self, target: Path) -> None:
        """Copy what belongs to the model beside weights, configuration and tokenizer."""
        for pattern in _KEPT:
            for path in self.folder.glob(pattern):
                shutil.copyfile(path, target / path.name)


def find_base_files(base: BaseSection) -> BaseFiles:
    """Find a base in its folder, in the hub's cache, or on the hub.

    Raises:
        RequestError: it is not there (at this revision), has no safetensors, or holds quantised weights.
    """
    require_folder(base)
    config = _file(base, "config.json")
    form = json.loads(config.read_text(encoding="utf-8")).get("quantization_config")
    if form is not None:
        raise RequestError(
            f"base.model {base.model}: its files hold quantised weights ({form.get('quant_method', 'unknown')})",
            "Give the 16-bit model that it was made from as base.model.",
        )
    if _has(base, _INDEX):
        names: dict[str, str] = json.loads(_file(base, _INDEX).read_text(encoding="utf-8"))["weight_map"]
        found = {each: _file(base, each) for each in sorted(set(names.values()))}
        return BaseFiles(base, config.parent, {name: found[each] for name, each in names.items()})
    if _has(base, _WEIGHTS):
        weights = _file(base, _WEIGHTS)
        return BaseFiles(base, config.parent, dict.fromkeys(_names(weights), weights))
    raise RequestError(
        f"base.model {base.model}: has no safetensors ({_WEIGHTS} or {_INDEX})",
        "Load it with transformers once and save it again with `save_pretrained`.",
    )


def loaded_bytes(base: BaseSection) -> int:
    """Memory that a base's weights take once they are loaded on a CPU, without the scales of quantised ones.

    Those that keep their type stay in their mapped files: the kernel lets go of them where it needs the room.

    Raises:
        RequestError: the base cannot be found.
    """
    import torch

    stored, dtype = find_base_files(base), getattr(torch, base.compute_dtype)
    others = 0 if stored.read(min(stored.files)).dtype == dtype else dtype.itemsize
    held, quantised = {"none": others, "int8": 1, "nf4": 0.5, "fp4": 0.5}[base.quantization], stored.quantised()
    weights = stored.blank().named_parameters()
    return int(sum(weight.numel() * (held if name in quantised else others) for name, weight in weights))


def _names(path: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return list(file.keys())


def _has(base: BaseSection, name: str) -> bool:
    """Whether a base has a file, which is fetched if it is on the hub."""
    from transformers.utils import cached_file

    missing_is_none = {"_raise_exceptions_for_missing_entries": False}
    return cached_file(base_location(base), name, revision=base.revision, **missing_is_none) is not None


def _file(base: BaseSection, name: str) -> Path:
    """A file that a base must have, fetched if it is on the hub."""
    from transformers.utils import cached_file

    reason = "it is not in this folder"
    try:
        if found := cached_file(base_location(base), name, revision=base.revision):
            return Path(found)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
    at = f" at revision {base.revision}" if base.revision else ""
    raise RequestError(
        f"base.model {base.model}{at}: {name} cannot be found: {reason}",
        "All files of the base that the adapter was trained on must be on this disk, or within reach on the hub.",
    )
