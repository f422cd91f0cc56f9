"""Ray's launcher accepts cluster.yaml, and the file does what the project's pages promise."""

import copy
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray._private.authentication import authentication_token_setup as authentication
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil

ROOT = Path(__file__).parents[2]


@pytest.fixture
def written() -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))
    return config


def accept(config: dict[str, Any]) -> dict[str, Any]:
    """Do what `ray up` does before it contacts the cloud: fill in Ray's defaults and validate."""
    resolved: dict[str, Any] = prepare_config(copy.deepcopy(config))
    validate_config(resolved)
    return resolved


def test_ray_accepts_it(written: dict[str, Any]) -> None:
    assert accept(written)["cluster_name"] == written["cluster_name"]


def test_ray_refuses_an_unknown_key(written: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError, match="setup_comands"):
        accept(written | {"setup_comands": []})


@pytest.mark.parametrize("field", ["resources", "node_config"])
def test_ray_refuses_a_node_type_without(field: str, written: dict[str, Any]) -> None:
    del written["available_node_types"]["gpu_spot"][field]
    with pytest.raises(jsonschema.ValidationError, match=f"'{field}' is a required property"):
        accept(written)


def test_ray_refuses_an_unknown_head_node_type(written: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="head_node_type"):
        accept(written | {"head_node_type": "boss"})


def test_the_head_takes_no_trial_and_gpu_machines_scale_from_zero(written: dict[str, Any]) -> None:
    config = accept(written)
    types = config["available_node_types"]
    head = types.pop(config["head_node_type"])
    assert head["resources"] == {"CPU": 0}
    assert head["max_workers"] == 0
    assert types
    for worker in types.values():
        assert worker["min_workers"] == 0
        assert 0 < worker["max_workers"] <= config["max_workers"]
        assert worker["resources"]["GPU"] >= 1


def test_every_node_installs_the_pinned_project(written: dict[str, Any]) -> None:
    config = accept(written)
    for commands in (config["head_setup_commands"], config["worker_setup_commands"]):
        assert any("pip install" in command and "-e ~/orchestrator" in command for command in commands)
    installs = [part for c in config["head_setup_commands"] for part in c.split("&&") if "pip install" in part]
    for install in installs:
        assert "-c ~/orchestrator/constraints.txt" in install or "==" in install, install


def test_every_node_mounts_the_shared_folder(written: dict[str, Any]) -> None:
    config = accept(written)
    for commands in (config["head_setup_commands"], config["worker_setup_commands"]):
        assert any("mount /shared" in command for command in commands)
    assert "--output /shared/" in (ROOT / "cluster.yaml").read_text(encoding="utf-8")


def test_the_synced_files_exist_and_suffice_to_install(written: dict[str, Any]) -> None:
    sources = [ROOT / local for local in written["file_mounts"].values() if not local.startswith("~")]
    assert [source for source in sources if not source.exists()] == []
    synced = {source.resolve() for source in sources}
    for needed in ("orchestrator", "pyproject.toml", "README.md", "constraints.txt", "experiments"):
        assert ROOT / needed in synced, needed


def test_every_node_asks_for_the_token(written: dict[str, Any]) -> None:
    """Ray reads the file by itself (`_get_default_token_path`), and on workers only with RAY_AUTH_MODE."""
    assert written["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert authentication._get_default_token_path() == Path.home() / ".ray" / "auth_token"
    config = accept(written)
    for commands in (config["head_setup_commands"], config["worker_setup_commands"]):
        (line,) = [command for command in commands if ".bashrc" in command]
        assert f"{authentication.AUTH_MODE_ENV_VAR}=token" in line
    assert "ray get-auth-token --generate" in (ROOT / "cluster.yaml").read_text(encoding="utf-8")


def alternative(provider: str) -> dict[str, Any]:
    """Read the commented sections for another provider."""
    for paragraph in (ROOT / "cluster.yaml").read_text(encoding="utf-8").split("\n\n"):
        lines = [line.removeprefix("#| ") for line in paragraph.splitlines() if line.startswith("#| ")]
        sections: dict[str, Any] = yaml.safe_load("\n".join(lines)) or {}
        if sections.get("provider", {}).get("type") == provider:
            return sections
    raise AssertionError(provider)


def test_ray_accepts_the_sections_for_google_cloud(written: dict[str, Any]) -> None:
    sections = alternative("gcp")
    config = accept(written | sections)
    ours, theirs = written["available_node_types"], config["available_node_types"]
    assert list(ours) == list(theirs)
    for name, node_type in theirs.items():
        assert node_type["resources"] == ours[name]["resources"]
        assert node_type.get("priority") == ours[name].get("priority")
    assert theirs["gpu_spot"]["node_config"]["scheduling"]["provisioningModel"] == "SPOT"
    assert "provisioningModel" not in theirs["gpu_on_demand"]["node_config"]["scheduling"]


def test_ray_accepts_the_section_for_machines_at_hand(written: dict[str, Any]) -> None:
    dropped = {"max_workers", "head_node_type", "available_node_types"}
    config = accept({name: value for name, value in written.items() if name not in dropped} | alternative("local"))
    (node_type,) = config["available_node_types"].values()
    assert node_type["min_workers"] == node_type["max_workers"] == 2
    assert config["worker_setup_commands"] == accept(written)["worker_setup_commands"]


def test_commands_are_valid_shell(written: dict[str, Any]) -> None:
    config = accept(written)
    for command in config["head_setup_commands"] + config["worker_setup_commands"]:
        # Ray runs it in parentheses (`command_runner._with_interactive`).
        checked = subprocess.run(["bash", "-n", "-c", f"true && ({command})"], capture_output=True, text=True)
        assert checked.returncode == 0, f"{command}: {checked.stderr}"


def test_the_usage_names_the_installed_ray() -> None:
    assert f'"ray[default]=={version("ray")}"' in (ROOT / "cluster.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize(("availability", "started"), [(1.0, "gpu_spot"), (0.0, "gpu_on_demand")])
def test_ray_starts_spot_machines_first_and_falls_back(
    availability: float, started: str, written: dict[str, Any]
) -> None:
    """Ask the scheduler that `ray up` uses (Ray's autoscaler v2) which machine it would start for a worker."""
    types = AutoscalingConfig(accept(written), skip_content_hash=True).get_node_type_configs()
    request = SchedulingRequest(
        node_type_configs=types,
        max_num_nodes=4,
        disable_launch_config_check=True,
        resource_requests=ResourceRequestUtil.group_by_count([ResourceRequestUtil.make({"GPU": 1})]),
        recoverable_resource_availabilities={"gpu_spot": availability},
    )
    reply = ResourceDemandScheduler().schedule(request)
    assert [(launch.instance_type, launch.count) for launch in reply.to_launch] == [(started, 1)]
    assert not reply.infeasible_resource_requests
