"""Serve a merged model with Ray Serve LLM: the config file for `serve deploy`.

The adapter is merged because Ray Serve LLM loads adapters only from cloud storage:
`lora_config.dynamic_lora_loading_path` must be an address such as s3://... (Ray 2.60).
"""

from pathlib import Path
from typing import Any

from orchestrator.deploy.dtypes import DTYPES, Dtype
from orchestrator.spec.optional_packages import missing_package

FILE = "serve.yaml"
MODEL = "model"
"""Folder of the merged model, next to the config file."""

_HEAD = """\
# Ray Serve LLM, with an OpenAI-compatible server on port 8000. On the cluster:
#   pip install "ray[llm]=={ray}"
#   serve deploy {file}
# All nodes that may serve must be able to read the folder in model_source. engine_kwargs takes any engine argument of
# vLLM. If the cluster has several GPU types, choose one with accelerator_type (such as H100). To serve on CPUs, add
# accelerator_config: {{kind: cpu}} next to model_loading_config; this needs a vLLM built for CPUs.
"""


def require_ray_serve() -> None:
    """Raise RequestError if the dependencies of Ray Serve are not installed; its schemas validate the config."""
    try:
        import ray.serve  # noqa: F401 (part of every Ray, but its imports are not)
    except ImportError as error:
        raise missing_package("ray.serve", "--format ray-serve", "ray-serve") from error


def serve_config(name: str, model: Path, dtype: Dtype) -> dict[str, Any]:
    """Build the config for `serve deploy`. The stop tokens come from the model's generation_config.json.

    Args:
        name: model name that clients send in requests.
        model: absolute path of the merged model's folder.
        dtype: type of its weights.
    """
    llm = {
        "model_loading_config": {"model_id": name, "model_source": str(model)},
        "engine_kwargs": {
            "dtype": DTYPES[dtype],
            "override_generation_config": {"temperature": 0},  # the default of a request, as in `orchestrator serve`
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


def validate_config(document: dict[str, Any]) -> None:
    """Validate a config with Ray's own schemas.

    Raises:
        pydantic.ValidationError: the config is invalid.
    """
    # `ray.serve.llm.LLMConfig` is this class, but importing it from there needs vLLM.
    from ray.llm._internal.serve.core.configs.llm_config import LLMConfig
    from ray.serve.schema import ServeDeploySchema

    for application in ServeDeploySchema.model_validate(document).applications:
        for llm in application.args["llm_configs"]:
            LLMConfig.model_validate(llm)


def write_config(folder: Path, target: Path, name: str, dtype: Dtype) -> None:
    """Write the config into `folder`. It refers to the model at its final place in `target`."""
    import yaml

    document = serve_config(name, target.resolve() / MODEL, dtype)
    validate_config(document)
    from ray import __version__

    head = _HEAD.format(ray=__version__, file=target.resolve() / FILE)
    (folder / FILE).write_text(head + yaml.safe_dump(document, sort_keys=False, width=120), encoding="utf-8")
