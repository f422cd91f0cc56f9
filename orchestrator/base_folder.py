"""What a base's own folder says: where it is, its configuration, and how its weights are stored."""

from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from orchestrator.documents import DocumentError, read_json
from orchestrator.embedded import BASE_DIR
from orchestrator.errors import RequestError, SpecError
from orchestrator.spec import SweepSpec
from orchestrator.spec.sections import BaseSection

DEQUANTIZED = {"mxfp4": "Mxfp4Config", "fp8": "FineGrainedFP8Config"}
"""Methods of quantization whose weights transformers dequantizes while it loads them -> its settings (5.23)."""

_FIELDS = ("quantization", "double_quant")
"""Fields of the base section that stored weights decide."""

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

Said = list[str]
"""Sentences for the user."""


def base_location(base: BaseSection) -> str:
    """Return the hub id or folder from which transformers loads the base."""
    return str(BASE_DIR) if base.model == "embedded" else base.model


def hub_id(model: str) -> str | None:
    """Return a base's id on the hub; None for the embedded one, and for a folder, which exists only on this machine."""
    return None if model == "embedded" or Path(model).is_absolute() else model


@cache
def base_commit(base: BaseSection) -> str | None:
    """Return the commit of a hub id and its revision on this machine; None for a folder or the embedded base."""
    if hub_id(base.model) is None or (config := config_file(base)) is None:
        return None
    return config.parent.name  # .../snapshots/COMMIT/config.json


def config_file(base: BaseSection) -> Path | None:
    """Return the base's configuration file; None for a hub id that is not fetched. A folder's file may not exist."""
    if hub_id(base.model) is None:
        return Path(base_location(base)) / "config.json"
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(base.model, "config.json", revision=base.revision)
    return Path(found) if isinstance(found, str) else None


def require_folder(base: BaseSection) -> None:
    """Raise RequestError if the base should be in a folder but is not there."""
    if Path(base.model).is_absolute() and not (Path(base.model) / "config.json").is_file():
        raise RequestError(f"base.model {base.model}: there is no model in this folder (no config.json)")


def not_loadable(base: BaseSection, error: Exception) -> RequestError:
    """Return the error for a base that transformers cannot load, with the remedy that fits."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if "Unrecognized configuration class" in reason:
        return RequestError(
            f"base.model {base.model}: transformers has no class that generates text with a model of this type",
            "Give a model whose config.json names an architecture that ends with ForCausalLM or "
            "ForConditionalGeneration of text and images.",
        )
    if "contains custom code" in reason:
        return RequestError(
            f"base.model {base.model}: brings its own Python code, which would run to load it",
            "If you trust that code, set base.trust_remote_code: true.",
        )
    if "model type" in reason and "does not recognize" in reason:
        return RequestError(
            f"base.model {base.model}: cannot be loaded: {reason}",
            "A newer transformers may know it. If the model brings Python code that you trust, set "
            "base.trust_remote_code: true.",
        )
    if hub_id(base.model) is None:
        return RequestError(
            f"base.model {base.model}: cannot be loaded: {reason}",
            "The folder must hold what transformers' `save_pretrained` writes: config.json, weights, the tokenizer.",
        )
    if base.revision and hub_id(base.model):
        return RequestError(
            f"base.model {base.model} at revision {base.revision}: cannot be loaded: {reason}",
            "base.revision must be a branch, a tag or a commit of it. Without a network it must be in the hub's cache: "
            f"`hf download {base.model} --revision {base.revision}`. Private models need HF_TOKEN.",
        )
    return RequestError(
        f"base.model {base.model}: cannot be loaded: {reason}",
        "Give a hub id (owner/name), a folder by its path, or `embedded`; private models need HF_TOKEN.",
    )


@dataclass(frozen=True)
class StoredQuantization:
    """How the files of a base hold quantized weights, as its configuration says."""

    method: str
    """transformers' name of the method."""
    quantization: Literal["nf4", "fp4", "int8"] | None
    """The value of base.quantization that means the same; None for methods other than bitsandbytes."""
    double_quant: bool
    compute_dtype: str | None
    """Type of products that the files name; None if they name none."""
    left_out: tuple[str, ...]
    """Names, or parts of names, of modules that are not quantized."""

    @classmethod
    def of(cls, settings: dict[str, Any]) -> "StoredQuantization":
        """Read a `quantization_config`."""
        method = str(settings.get("quant_method", "bitsandbytes" if "load_in_4bit" in settings else "unknown"))
        kind: Any = None
        if method == "bitsandbytes":
            kind = settings.get("bnb_4bit_quant_type", "fp4") if settings.get("load_in_4bit") else "int8"
        dtype = settings.get("bnb_4bit_compute_dtype", "float32") if kind in ("nf4", "fp4") else None
        return cls(
            method,
            kind,
            bool(settings.get("bnb_4bit_use_double_quant", False)),
            dtype and str(dtype).removeprefix("torch."),
            tuple(settings.get("llm_int8_skip_modules") or settings.get("modules_to_not_convert") or ()),
        )

    @property
    def is_dequantized(self) -> bool:
        """Whether the weights are dequantized while they are loaded, and may then be quantized in another way."""
        return self.method in DEQUANTIZED

    def require_trainable(self, model: str) -> None:
        """Raise RequestError if adapters cannot be trained on such weights."""
        if self.quantization is None and not self.is_dequantized:
            raise RequestError(
                f"base.model {model}: its files contain weights of {self.method}, on which adapters cannot be trained",
                "Set base.model to the 16-bit model that it was made from; base.quantization quantizes that one while "
                "it is loaded. Files of bitsandbytes, mxfp4 and fp8 work too.",
            )

    def applied_to(self, base: BaseSection) -> BaseSection:
        """Return the section with the fields that these weights decide."""
        if self.quantization is None:
            return base
        double = {} if self.quantization == "int8" else {"double_quant": self.double_quant}
        return base.model_copy(update={"quantization": self.quantization, **double})

    def notes(self, base: BaseSection) -> Said:
        """Say how the stored weights differ from the base section, and what cannot be done with them."""
        place = f"base.model {base.model}"
        if self.is_dequantized:
            then = "" if base.quantization == "none" else f", then quantized ({base.quantization})"
            return [
                f"{place}: is stored in {self.method}; it is dequantized while it is loaded{then}",
                f"{place}: adapters on it cannot be merged (`export --format adapter` works)",
            ]
        stored, said = self.applied_to(base), []
        if differ := [name for name in _FIELDS if getattr(stored, name) != getattr(base, name)]:
            values = ", ".join(f"{name} {getattr(stored, name)}" for name in differ)
            given = ", ".join(str(getattr(base, name)) for name in differ)
            said.append(f"{place}: its weights are stored with base.{values}, which is used instead of {given}")
        if self.compute_dtype not in (None, base.compute_dtype):
            said.append(f"{place}: names compute type {self.compute_dtype}; base.compute_dtype is used instead")
        kind = f"{self.quantization} weights" + (f" ({len(self.left_out)} modules left out)" if self.left_out else "")
        return [
            *said,
            f"{place}: contains {kind}, so adapters on it cannot be merged (`export --format adapter` works)",
        ]


def model_type(base: BaseSection) -> str | None:
    """Return transformers' name of the base's architecture; None for a base that is not on this machine."""
    kind = config_document(base).get("model_type")
    return kind if isinstance(kind, str) else None


def config_document(base: BaseSection) -> dict[str, Any]:
    """Return the base's config.json; {} for a base that is not on this machine, and for a file that is no JSON object.

    transformers reports such a file where it loads the base.
    """
    file = config_file(base)
    if file is None or not file.is_file():
        return {}
    try:
        document = read_json(file)
    except DocumentError:
        return {}
    return document if isinstance(document, dict) else {}


def text_document(base: BaseSection) -> dict[str, Any]:
    """Return the part of `config_document` that describes the text model: of most bases, all of it."""
    document = config_document(base)
    return document.get("text_config") or document


_NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Fields of configurations that give the number of experts (transformers 5.23)."""


def has_experts(base: BaseSection) -> bool:
    """Return whether a base's configuration declares several experts; False for a base that is not on this machine."""
    document = config_document(base)
    parts = [document, document.get("text_config") or {}]
    numbers = [part.get(name) for part in parts for name in _NUM_EXPERTS]
    return any(isinstance(number, int) and number > 1 for number in numbers)


def weight_map(base: BaseSection) -> dict[str, str]:
    """Return the names of the weights in the base's safetensors files, with the file that has each; {} without such."""
    if index := find_file(base, INDEX):
        try:
            document = read_json(index)
        except DocumentError as error:
            raise RequestError(f"{index}: {error}", "Download the base again.") from error
        names = document.get("weight_map") if isinstance(document, dict) else None
        if not isinstance(names, dict):
            raise RequestError(f"{index}: has no weight_map", "Download the base again.")
        return names
    if weights := find_file(base, WEIGHTS):
        from safetensors import safe_open

        with safe_open(weights, "pt") as file:
            return dict.fromkeys(file.keys(), WEIGHTS)
    return {}


def find_file(base: BaseSection, name: str) -> Path | None:
    """Return a file of the base, or None if it has none of this name.

    A file on the hub is downloaded. Without a network, one that is not in the cache is missing too.
    """
    from transformers.utils import cached_file

    missing_is_none = {"_raise_exceptions_for_missing_entries": False}
    found = cached_file(base_location(base), name, revision=base.revision, **missing_is_none)
    return None if found is None else Path(found)


def require_file(base: BaseSection, name: str) -> Path:
    """Return a file that a base must have. A file on the hub is downloaded.

    Raises:
        RequestError: there is no such file.
    """
    from transformers.utils import cached_file

    reason = "the folder does not contain it"
    try:
        if found := cached_file(base_location(base), name, revision=base.revision):
            return Path(found)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
    at = f" at revision {base.revision}" if base.revision else ""
    raise RequestError(
        f"base.model {base.model}{at}: {name} cannot be found: {reason}",
        "All files of the base must be on this disk, or downloadable from the hub.",
    )


def stored_quantization(base: BaseSection) -> StoredQuantization | None:
    """Read how the base's files hold quantized weights.

    Returns:
        None if they hold none, or if the base is not on this machine.
    """
    return quantization_of(config_document(base))


def quantization_of(config: dict[str, Any]) -> StoredQuantization | None:
    """Return what a model's configuration, or that of its text model, says of quantized weights."""
    for part in (config, config.get("text_config") or {}):
        if settings := part.get("quantization_config"):
            return StoredQuantization.of(settings)
    return None


def as_stored(spec: SweepSpec, fetch: bool = True) -> tuple[SweepSpec, Said]:
    """Replace fields of the base section by what the base's files hold.

    Args:
        spec: the experiment.
        fetch: download the configuration of a base on the hub that is not on this machine.

    Returns:
        The experiment, and what to tell the user about it.

    Raises:
        RequestError: adapters cannot be trained on these files.
        SpecError: the experiment searches or needs another quantization than that of the files.
    """
    base = spec.base
    if hub_id(base.model) is not None:
        if not fetch:
            return spec, []
        _fetch_config(base)
    stored = stored_quantization(base)
    if stored is None:
        return spec, []
    stored.require_trainable(base.model)
    if stored.quantization is not None:
        for path in (*spec.search.space, *spec.search.tied):
            if path.partition(".")[0] == "base" and path.partition(".")[2] in _FIELDS:
                raise SpecError(
                    f"search: {path} cannot vary, because the files of base.model {base.model} contain "
                    f"{stored.quantization} weights",
                    "Take it out of search, or set base.model to the 16-bit model that this one was made from.",
                )
    if stored.applied_to(base) == base:
        return spec, stored.notes(base)
    document = spec.model_dump(mode="json") | {"base": stored.applied_to(base).model_dump(mode="json")}
    try:
        return SweepSpec.model_validate(document), stored.notes(base)
    except ValidationError as error:
        reason = str(error.errors()[0]["msg"]).removeprefix("Value error, ")
        raise SpecError(
            f"base.model {base.model}: its files contain {stored.quantization} weights: {reason}",
            "Set base.model to the 16-bit model that it was made from.",
        ) from error


def _fetch_config(base: BaseSection) -> None:
    """Download the configuration of a base on the hub. If that fails, loading its tokenizer says why."""
    from huggingface_hub import hf_hub_download

    with suppress(OSError, ValueError):
        hf_hub_download(base.model, "config.json", revision=base.revision)


def require_trusted_code(base: BaseSection, name: str, is_trusted: bool) -> None:
    """Refuse a base whose Python code would run on this machine because somebody else's record says so.

    Args:
        base: the base that a record names.
        name: the sweep or the adapter folder with that record.
        is_trusted: whether the user of this command has allowed it.

    Raises:
        RequestError: the base brings code, and it is not trusted.
    """
    if base.trust_remote_code and not is_trusted:
        raise RequestError(
            f"{name}: its base {base.model} brings Python code, which would run on this machine",
            "Give --trust-remote-code (in Python trust_remote_code=True) if you trust its author.",
        )
