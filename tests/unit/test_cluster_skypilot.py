"""The SkyPilot task has SkyPilot's fields and can be recovered on another machine.

A test without SkyPilot and a cloud cannot show that a machine of that kind exists, or that its image suffices.
"""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

import orchestrator.errors

ROOT = Path(__file__).parents[2]

# A part of the fields of skypilot-org/skypilot, sky/utils/schemas.py at commit 00052df: `get_task_schema` and
# `get_resources_schema`.
TASK = {
    "name": str,
    "workdir": (str, dict),
    "num_nodes": int,
    "resources": dict,
    "file_mounts": dict,
    "volumes": dict,
    "envs": dict,
    "secrets": (dict, list),
    "config": dict,
    "setup": str,
    "run": str,
}
CANDIDATE = {
    "infra": str,
    "accelerators": (str, dict),
    "cpus": (str, int, float),
    "memory": (str, int, float),
    "instance_type": str,
    "use_spot": bool,
    "disk_size": (str, int),
    "disk_tier": str,
    "image_id": (str, dict),
    "labels": dict,
    "max_hourly_cost": (int, float),
    "job_recovery": (str, dict),
}
RESOURCES = {**CANDIDATE, "accelerators": (str, dict, list), "any_of": list, "ordered": list}
RECOVERY = {"strategy": (str, type(None)), "max_restarts_on_errors": int, "recover_on_exit_codes": (int, list)}


@pytest.fixture
def task() -> dict[str, Any]:
    text = (ROOT / "deploy" / "skypilot" / "sweep.yaml").read_text(encoding="utf-8")
    written: dict[str, Any] = yaml.safe_load(text)
    return written


def require_known(fields: dict[str, Any], known: dict[str, Any]) -> None:
    for name, value in fields.items():
        assert name in known, name
        assert isinstance(value, known[name]), name


def test_skypilot_knows_all_fields(task: dict[str, Any]) -> None:
    require_known(task, TASK)
    require_known(task["resources"], RESOURCES)
    for candidate in task["resources"]["any_of"]:
        require_known(candidate, CANDIDATE)
    require_known(task["resources"]["job_recovery"], RECOVERY)
    assert all(re.fullmatch(r"[a-zA-Z_]\w*", name) and type(value) is str for name, value in task["envs"].items())
    assert re.fullmatch(r"aws/[^/]+", task["resources"]["infra"])


def test_spot_and_on_demand_machines_are_candidates(task: dict[str, Any]) -> None:
    assert task["resources"]["any_of"] == [{"use_spot": True}, {"use_spot": False}]


def test_it_recovers_from_the_codes_after_which_a_sweep_can_go_on(task: dict[str, Any]) -> None:
    """130 is Ctrl-C, which a person gave; 74 is storage, which another machine does not mend."""
    documented = {int(code) for code in re.findall(r"\b(?:69|74|1[234]\d)\b", orchestrator.errors.__doc__ or "")}
    codes = set(task["resources"]["job_recovery"]["recover_on_exit_codes"])
    assert codes == documented - {74, 130}


def test_the_synced_files_exist_and_suffice(task: dict[str, Any]) -> None:
    mounts = task["file_mounts"]
    assert [local for local in mounts.values() if not (ROOT / local).exists()] == []
    for needed in ("orchestrator", "pyproject.toml", "README.md", "constraints.txt", "experiments"):
        assert mounts[f"~/orchestrator/{needed}"] == f"./{needed}"
    assert "deploy/sweep-or-resume" in task["run"]
    assert "~/orchestrator/deploy/sweep-or-resume" in mounts
    assert (ROOT / task["envs"]["EXPERIMENT"]).is_file()


def test_each_machine_installs_the_pinned_project_and_mounts_the_folder(task: dict[str, Any]) -> None:
    assert "pip install -q -c ~/orchestrator/constraints.txt -e ~/orchestrator" in task["setup"]
    assert '"$NFS" /shared' in task["setup"]
    assert " /shared/runs" in task["run"]


@pytest.mark.parametrize("part", ["setup", "run"])
def test_commands_are_valid_shell(part: str, task: dict[str, Any]) -> None:
    checked = subprocess.run(["bash", "-n", "-c", task[part]], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
