"""The files of a base: where they are found, and the memory that they take."""

import json
from pathlib import Path
from typing import Any

import pytest
from family_bases import base_model
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file
from small_qwen import BF16, COMMIT, FP32, MakeAdapterRef

from orchestrator.base import load_base
from orchestrator.deploy.export.base_files import find_base_files, loaded_bytes
from orchestrator.embedded import BASE_DIR
from orchestrator.errors import RequestError
from orchestrator.spec.sections import BaseSection
from orchestrator.training.model.linear_layers import linear_layers


@pytest.mark.parametrize(
    ("quantization", "compute_dtype"),
    [("none", FP32), ("none", "float16"), ("int8", FP32), ("nf4", FP32), ("fp4", "float16")],
)
def test_the_memory_of_a_base_is_known_without_loading_it(
    make_adapter: MakeAdapterRef, quantization: str, compute_dtype: str
) -> None:
    base = make_adapter(base_fields={"quantization": quantization, "compute_dtype": compute_dtype}).base
    assert loaded_bytes(base) == sum(weight.nbytes for weight in load_base(base).parameters())


@pytest.mark.parametrize("config_names_dtype", [True, False])
def test_weights_that_keep_their_type_are_not_counted(make_adapter: MakeAdapterRef, config_names_dtype: bool) -> None:
    """They stay in mapped files. Their type is read from the files, even if config.json does not name it."""
    base = make_adapter(base_fields={"quantization": "none", "compute_dtype": BF16}).base
    config = Path(base.model) / "config.json"
    if not config_names_dtype:
        config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": None}))
    assert loaded_bytes(base) == 0


def test_a_base_on_the_hub_is_found_at_its_revision(hub: Path) -> None:
    base = BaseSection(model="someone/small")
    for revision in (None, "main", COMMIT):
        found = find_base_files(base.model_copy(update={"revision": revision}))
        assert found.folder == hub / "snapshots" / COMMIT
        assert set(found.files) == set(load_file(BASE_DIR / "model.safetensors"))
    other = COMMIT[::-1]
    with pytest.raises(RequestError, match=rf"base\.model someone/small at revision {other}: config\.json cannot"):
        find_base_files(base.model_copy(update={"revision": other}))
    with pytest.raises(RequestError, match=r"base\.model someone/else: config\.json cannot be found"):
        find_base_files(BaseSection(model="someone/else"))


@pytest.mark.parametrize("family", ["gemma3", "llava", "mistral3", "qwen2_5_vl", "qwen3_vl"])
def test_towers_are_what_text_does_not_reach(family: str, tmp_path: Path) -> None:
    base_model(family).save_pretrained(tmp_path)
    files = find_base_files(BaseSection(model=str(tmp_path)))
    layers = linear_layers(base_model(family))
    unreached = {f"{name}.weight" for name, reason in layers.left_out.items() if reason == "unreached"}
    names = [f"{name}.weight" for name in layers.shapes]
    assert {*names} - files.reached_by_text([*names, "lm_head.weight"]) == unreached
    assert unreached
    assert files.reached_by_text(["lm_head.weight"])


def test_all_weights_of_a_base_of_text_are_reached(make_adapter: MakeAdapterRef) -> None:
    assert find_base_files(make_adapter().base).reached_by_text(["model.norm.weight"]) == {"model.norm.weight"}


def test_processors_of_a_base_on_the_hub_are_fetched(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading the base has not downloaded them."""
    files = find_base_files(BaseSection(model="someone/small"))

    def download(_: str, name: str, **__: Any) -> str:
        if name != "preprocessor_config.json":
            raise LocalEntryNotFoundError(name)
        file = hub / "snapshots" / COMMIT / name
        file.write_text("{}")
        return str(file)

    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", download)
    files.copy_rest(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"preprocessor_config.json", "generation_config.json"}
