"""A merged model as a Ray Serve LLM application: the config file that `serve deploy` takes.

The model is merged, for Ray Serve LLM loads adapters from cloud storage alone: `lora_config.dynamic_lora_loading_path`
must be an address such as s3://... (Ray 2.60).
"""

from pathlib import Path
from typing import Any

from orchestrator.deploy.export.merge import DTYPES, Dtype
from orchestrator.spec.optional_packages import missing_package

FILE = "serve.yaml"
MODEL = "model"
"""Folder of the merged model beside it."""

_HEAD = """\
# Ray Serve LLM, with an OpenAI-compatible server on port 8000. On the cluster:
#   pip install "ray[llm]=={ray}"
#   serve deploy {file}
# All nodes that may serve must see the folder in model_source. More engine_kwargs are vLLM's engine arguments; name a
# GPU's type by accelerator_type (such as H100) where the cluster has several. Beside model_loading_config,
# accelerator_config: {{kind: cpu}} serves on CPUs, by a vLLM that is built for them.
"""


def require_ray_serve() -> None:
    """Raises RequestError where what Ray Serve needs is not installed: the config is held against its schema."""
    try:
        import ray.serve  # noqa: F401 (it is part of any Ray; what it imports is not)
    except ImportError as error:
        raise missing_package("ray.serve", "--format ray-serve", "ray-serve") from error


def serve_config(name: str, model: Path, dtype: Dtype) -> dict[str, Any]:
    """Describe the application as `serve deploy` reads it. Its answers stop as the model's generation_config.json says.

    Args:
        name: by which clients ask for the model.
        model: folder of the merged model, absolute.
        dtype: of its weights.
    """
    llm = {
        "model_loading_config": {"model_id": name, "model_source": str(model)},
        "engine_kwargs": {
            "dtype": DTYPES[dtype],
            "override_generation_config": {"temperature": 0},  # unless a request says otherwise, as `serve` has it
        },
        "deployment_config": {"autoscaling_config": {"min_replicas": 1, "max_replicas": 1}},
    }
    application = {
        "name": name,
        "route_prefix": "/",
        "import_path": "ray.serve.llm:build_openai_app",
        "args": {"llm_configs": [llm]},
    }
    return {"applications": [application]}


def check(document: dict[str, Any]) -> None:
    """Hold a config against Ray's own schemas.

    Raises:
        pydantic.ValidationError: it is not valid.
    """
    # `ray.serve.llm.LLMConfig` is this class; to import it from there needs vLLM.
    from ray.llm._internal.serve.core.configs.llm_config import LLMConfig
    from ray.serve.schema import ServeDeploySchema

    for application in ServeDeploySchema.model_validate(document).applications:
        for llm in application.args["llm_configs"]:
            LLMConfig.model_validate(llm)


def write(folder: Path, target: Path, name: str, dtype: Dtype) -> None:
    """Write the config into `folder`, naming the model as it will lie in `target`."""
    import yaml

    document = serve_config(name, target.resolve() / MODEL, dtype)
    check(document)
    from ray import __version__

    head = _HEAD.format(ray=__version__, file=target.resolve() / FILE)
    (folder / FILE).write_text(head + yaml.safe_dump(document, sort_keys=False, width=120), encoding="utf-8")
