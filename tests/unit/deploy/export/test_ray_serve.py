"""The config file of a Ray Serve LLM application."""

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from orchestrator.deploy.export import ray_serve
from orchestrator.deploy.export.ray_serve import FILE, MODEL, require_ray_serve, serve_config, validate_config
from orchestrator.errors import RequestError

CONFIG = serve_config("abc_00001", Path("/shared/out/model"), "bf16")


def test_the_config_names_model_dtype_and_builder() -> None:
    (application,) = CONFIG["applications"]
    assert application["import_path"] == "ray.serve.llm:build_openai_app"
    (llm,) = application["args"]["llm_configs"]
    assert llm["model_loading_config"] == {"model_id": "abc_00001", "model_source": "/shared/out/model"}
    assert llm["engine_kwargs"] == {"dtype": "bfloat16", "override_generation_config": {"temperature": 0}}


def test_the_config_refers_to_the_model_in_the_target(tmp_path: Path) -> None:
    pytest.importorskip("ray.serve", exc_type=ImportError)
    ray_serve.write_config(tmp_path, tmp_path / "target", "abc_00001", "fp16")
    text = (tmp_path / FILE).read_text()
    document = yaml.safe_load(text)
    assert document == serve_config("abc_00001", tmp_path / "target" / MODEL, "fp16")
    assert f"serve deploy {tmp_path / 'target' / FILE}" in text
    validate_config(document)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("applications", 0, "import_path"), "no colon or dot"),
        (("applications",), "none"),
        (("applications", 0, "args", "llm_configs", 0, "model_loading_config", "model_sauce"), "x"),
        (("applications", 0, "args", "llm_configs", 0, "accelerator_type"), "abacus"),
        (("applications", 0, "args", "llm_configs", 0, "deployment_config", "num_replicas"), -1),
    ],
)
def test_rays_schema_rejects_an_invalid_config(path: tuple[Any, ...], value: Any) -> None:
    pytest.importorskip("ray.serve", exc_type=ImportError)
    document = yaml.safe_load(yaml.safe_dump(CONFIG))
    validate_config(document)
    within = document
    for key in path[:-1]:
        within = within[key]
    within[path[-1]] = value
    with pytest.raises(ValidationError):
        validate_config(document)


def test_missing_ray_serve_is_reported_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray.serve", None)  # as if the extra were not installed
    with pytest.raises(RequestError, match=r"--format ray-serve needs the package ray\.serve") as caught:
        require_ray_serve()
    assert "qlora-orchestrator[ray-serve]" in caught.value.remedy
