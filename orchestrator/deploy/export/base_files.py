"""The files of a base model: its weights by name, read one at a time."""

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from orchestrator.adapters.stops import read_stops, stop_ids
from orchestrator.base import configuration, model_class
from orchestrator.base_folder import (
    INDEX,
    WEIGHTS,
    find_file,
    require_file,
    require_folder,
    stored_quantization,
    weight_map,
)
from orchestrator.base_weights import quantization_config
from orchestrator.errors import RequestError
from orchestrator.spec.sections import BaseSection
from orchestrator.upstream import names_in_model

T = TypeVar("T")

_COPIED_FILES = (
    "generation_config.json",
    "tokenizer.model",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
)
"""Files that are copied into a merged model unchanged.

Converters read `tokenizer.model`, servers of multimodal models the configurations of their processors.
"""

_COPIED_CODE = "*.py"


@dataclass(frozen=True)
class BaseFiles:
    """The files of a base with 16- or 32-bit weights."""

    base: BaseSection
    folder: Path
    files: dict[str, Path]
    """Name of a weight -> its safetensors file."""

    @cached_property
    def config(self) -> Any:
        """The model's transformers configuration."""
        return configuration(self.base)

    def meta_model(self) -> Any:
        """Build the model on the meta device, without reading weights."""
        return _meta_model(self.config, self.base.trust_remote_code)

    def stored_names(self, model: Any) -> "StoredNames":
        """Return the names of the model's weights in these files.

        Args:
            model: the model, from `meta_model`.
        """
        by_stored = names_in_model(model, self.files)
        return StoredNames(self, {name: stored for stored, name in by_stored.items() if name is not None})

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a weight, without reading the weight."""
        from safetensors import safe_open

        with safe_open(self.files[name], "pt") as file:
            return tuple(file.get_slice(name).get_shape())

    def meta_weight(self, name: str, dtype: Any) -> Any:
        """Return a weight on the meta device, as it is after a cast to `dtype`. Integer weights keep their type."""
        import torch
        from safetensors import safe_open

        with safe_open(self.files[name], "pt") as file:
            part = file.get_slice(name)
            if not part.get_dtype().startswith(("F", "BF")):
                dtype = file.get_tensor(name).dtype
            return torch.empty(part.get_shape(), dtype=dtype, device="meta")

    def read(self, name: str) -> Any:
        """Read a weight.

        The file is opened for this weight alone: the pages of a mapped file count as memory until it is closed.
        """
        from safetensors import safe_open

        with safe_open(self.files[name], "pt") as file:
            return file.get_tensor(name)

    def reached_by_text(self, names: Iterable[str]) -> set[str]:
        """Return the weights that are not in a tower for images or sound.

        Args:
            names: weights, by their names in the model.
        """
        model = self.meta_model()
        if model.config.get_text_config() is model.config:
            return {*names}
        decoder = model.get_decoder()
        path = next(name for name, module in model.named_modules() if module is decoder)
        return {name for name in names if name.startswith(f"{path}.") or not name.startswith("model.")}

    def quantized_layers(self) -> dict[str, Any]:
        """Return the layers that `base.load_base` quantizes, as transformers selects them.

        Returns:
            Name of a weight -> its bitsandbytes layer on the meta device.
        """
        from bitsandbytes.nn import Linear4bit, Linear8bitLt
        from transformers.quantizers import AutoHfQuantizer

        if self.base.quantization == "none":
            return {}
        model = self.meta_model()
        quantizer = AutoHfQuantizer.from_config(quantization_config(self.base), pre_quantized=False)
        quantizer.preprocess_model(model=model, device_map=None)
        layers = {
            name: module for name, module in model.named_modules() if isinstance(module, Linear4bit | Linear8bitLt)
        }
        return {f"{name}.weight": module for name, module in layers.items()}

    @property
    def stops(self) -> list[int]:
        """Token ids that end the base's own answers, as transformers reads them."""
        return read_stops(self.folder) or stop_ids(getattr(self.config.get_text_config(), "eos_token_id", None))

    def copy_rest(self, target: Path) -> None:
        """Copy the model's other files: those besides weights, configuration and tokenizer.

        Loading a base fetches no processors. Those on the hub are downloaded; without a network they are left out.
        """
        for name in _COPIED_FILES:
            if found := find_file(self.base, name):
                shutil.copyfile(found, target / name)
        for path in self.folder.glob(_COPIED_CODE):
            shutil.copyfile(path, target / path.name)


@dataclass(frozen=True)
class StoredNames:
    """Names of a model's weights -> their names in its files, which differ in some families (Gemma 3, Qwen3.5)."""

    base_files: BaseFiles
    names: Mapping[str, str]
    """Weights that transformers computes from others while it loads are left out."""

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def of(self, name: str) -> str:
        """Return the name in the files of a weight of the model.

        Raises:
            RequestError: the files do not contain this weight, or contain it in another form.
        """
        if name in self.names:
            return self.names[name]
        place = f"base.model {self.base_files.base.model}: {self.base_files.folder}"
        if len(self.names) < len(self.base_files.files):
            raise RequestError(
                f"{place} contains no weight from which {name} could be merged: transformers computes some weights "
                "of this base from several others while it loads them",
                "Export it as an adapter (`--format adapter`).",
            )
        raise RequestError(f"{place} contains no weight named {name}")

    def renamed(self, by_name: Mapping[str, T]) -> dict[str, T]:
        """Return a mapping with the names in the files as keys.

        Raises:
            RequestError: as `of`.
        """
        return {self.of(name): value for name, value in by_name.items()}


def _meta_model(config: Any, trust_remote_code: bool) -> Any:
    """Build a model on the meta device, without reading weights."""
    import torch

    with torch.device("meta"):
        return model_class(config).from_config(config, trust_remote_code=trust_remote_code)


def find_base_files(base: BaseSection) -> BaseFiles:
    """Find the files of a base in its folder, in the hub's cache, or on the hub.

    Raises:
        RequestError: the base is not there (at this revision), has no safetensors, or has quantized weights.
    """
    require_folder(base)
    config = require_file(base, "config.json")
    if stored := stored_quantization(base):
        raise RequestError(
            f"base.model {base.model}: its files contain quantized weights ({stored.method}), which cannot be merged",
            "Export it as an adapter (`--format adapter`). To merge, train on the 16-bit model that it was made from"
            + (", or on a copy that transformers has dequantized and saved." if stored.is_dequantized else "."),
        )
    if names := weight_map(base):
        found = {each: require_file(base, each) for each in sorted(set(names.values()))}
        return BaseFiles(base, config.parent, {name: found[each] for name, each in names.items()})
    raise RequestError(
        f"base.model {base.model}: has no safetensors ({WEIGHTS} or {INDEX})",
        "Load it with transformers and save it with `save_pretrained`.",
    )


def loaded_bytes(base: BaseSection) -> int:
    """Return the bytes that a base's weights take after loading on a CPU, without the scales of quantized weights.

    Weights that keep their type are not counted: they stay in mapped files, whose pages the kernel can release.

    Raises:
        RequestError: the base cannot be found.
    """
    import torch

    dtype = getattr(torch, base.compute_dtype)
    if stored := stored_quantization(base):
        if stored.is_dequantized:
            weights = _meta_model(configuration(base), base.trust_remote_code).parameters()
            return int(sum(weight.numel() for weight in weights) * dtype.itemsize)
        return sum(require_file(base, name).stat().st_size for name in set(weight_map(base).values()))
    base_files = find_base_files(base)
    plain_size = 0 if base_files.read(min(base_files.files)).dtype == dtype else dtype.itemsize
    quantized_size = {"none": plain_size, "int8": 1, "nf4": 0.5, "fp4": 0.5}[base.quantization]
    quantized, model = set(base_files.quantized_layers()), base_files.meta_model()
    if base.is_4bit:
        from orchestrator.experts import expert_matrices

        quantized |= expert_matrices(model).keys()
    weights = model.named_parameters()
    sizes = (weight.numel() * (quantized_size if name in quantized else plain_size) for name, weight in weights)
    return int(sum(sizes))
