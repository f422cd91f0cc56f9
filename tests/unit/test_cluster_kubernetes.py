"""The Kubernetes files have KubeRay's fields and do what their comments promise.

A test without a Kubernetes cluster cannot show that its machines have the labels, that the claim can be bound, that
the operator accepts the values of the fields, or that pods are drained.
"""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler.v2.instance_manager import config as autoscaler

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "kuberay"

STRINGS = {str: str}
"""An object of any names with strings."""

_CONTAINER = {
    "name": str,
    "image": str,
    "command": [str],
    "args": [str],
    "env": [{"name": str, "value": str, "valueFrom": {"secretKeyRef": {"name": str, "key": str, "optional": bool}}}],
    "envFrom": [{"prefix": str, "secretRef": {"name": str, "optional": bool}}],
    "volumeMounts": [{"name": str, "mountPath": str, "readOnly": bool, "subPath": str}],
    "resources": {"requests": STRINGS, "limits": STRINGS},
    "imagePullPolicy": str,
}
_POD = {
    "metadata": {"labels": STRINGS, "annotations": STRINGS},
    "spec": {
        "nodeSelector": STRINGS,
        "tolerations": [{"key": str, "operator": str, "value": str, "effect": str, "tolerationSeconds": int}],
        "securityContext": {"runAsNonRoot": bool, "runAsUser": int, "runAsGroup": int, "fsGroup": int},
        "terminationGracePeriodSeconds": int,
        "volumes": [{"name": str, "persistentVolumeClaim": {"claimName": str, "readOnly": bool}}],
        "containers": [_CONTAINER],
        "serviceAccountName": str,
        "imagePullSecrets": [{"name": str}],
    },
}
_GROUP = {"rayStartParams": STRINGS, "labels": STRINGS, "resources": STRINGS, "template": _POD}
_CLUSTER = {
    "rayVersion": str,
    "authOptions": {"mode": str, "secretName": str, "enableK8sTokenAuth": bool},
    "enableInTreeAutoscaling": bool,
    "autoscalerOptions": {"version": str, "idleTimeoutSeconds": int, "upscalingMode": str, "env": _CONTAINER["env"]},
    "suspend": bool,
    "headGroupSpec": {**_GROUP, "serviceType": str, "enableIngress": bool},
    "workerGroupSpecs": [
        {
            **_GROUP,
            "groupName": str,
            "priority": int,
            "replicas": int,
            "minReplicas": int,
            "maxReplicas": int,
            "numOfHosts": int,
            "idleTimeoutSeconds": int,
            "suspend": bool,
        }
    ],
}
_JOB = {
    "entrypoint": str,
    "submissionMode": str,
    "backoffLimit": int,
    "shutdownAfterJobFinishes": bool,
    "ttlSecondsAfterFinished": int,
    "activeDeadlineSeconds": int,
    "runtimeEnvYAML": str,
    "suspend": bool,
    "rayClusterSpec": _CLUSTER,
}
FIELDS = {"RayCluster": _CLUSTER, "RayJob": _JOB}
"""Fields of `spec` that the files may use, with their types. They are a part of the fields of KubeRay v1.7.0,
helm-chart/kuberay-operator/crds/ray.io_rayclusters.yaml and ray.io_rayjobs.yaml (version v1)."""


def faults(value: Any, known: Any, place: str) -> list[str]:
    """Return the places in `value` that have a name or a type that `known` does not have."""
    if isinstance(known, type):
        return [] if type(value) is known else [f"{place}: {value!r} is no {known.__name__}"]
    if isinstance(known, list):
        if not isinstance(value, list):
            return [f"{place}: {value!r} is no list"]
        return [fault for number, item in enumerate(value) for fault in faults(item, known[0], f"{place}[{number}]")]
    if not isinstance(value, dict):
        return [f"{place}: {value!r} is no object"]
    found = []
    for name, item in value.items():
        if name in known or str in known:
            found += faults(item, known.get(name, known.get(str)), f"{place}.{name}")
        else:
            found.append(f"{place}.{name}: unknown field")
    return found


def read(name: str) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))
    return document


@pytest.fixture
def cluster() -> dict[str, Any]:
    spec: dict[str, Any] = read("raycluster.yaml")["spec"]
    return spec


def pods(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [group["template"]["spec"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml"])
def test_kuberay_knows_all_fields(name: str) -> None:
    document = read(name)
    assert document["apiVersion"] == "ray.io/v1"
    assert faults(document["spec"], FIELDS[document["kind"]], "spec") == []


def test_wrong_fields_are_found(cluster: dict[str, Any]) -> None:
    cluster["workerGroupSpecs"][0]["template"]["spec"]["toleration"] = []
    cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0
    cluster["workerGroupSpecs"][1]["maxReplicas"] = True
    assert faults(cluster, _CLUSTER, "spec") == [
        "spec.headGroupSpec.rayStartParams.num-cpus: 0 is no str",
        "spec.workerGroupSpecs[0].template.spec.toleration: unknown field",
        "spec.workerGroupSpecs[1].maxReplicas: True is no int",
    ]


def test_the_job_has_the_same_cluster(cluster: dict[str, Any]) -> None:
    assert read("rayjob.yaml")["spec"]["rayClusterSpec"] == cluster


def test_clients_need_a_token_from_a_secret(cluster: dict[str, Any]) -> None:
    assert cluster["authOptions"] == {"mode": "token", "secretName": "orchestrator-ray-token"}
    text = (FOLDER / "raycluster.yaml").read_text(encoding="utf-8")
    assert "kubectl create secret generic orchestrator-ray-token --from-file=auth_token=/dev/stdin" in text


def test_pods_run_the_installed_ray(cluster: dict[str, Any]) -> None:
    assert cluster["rayVersion"] == version("ray")


def test_the_head_takes_no_trial_and_gpu_pods_scale_from_zero(cluster: dict[str, Any]) -> None:
    assert cluster["enableInTreeAutoscaling"]
    assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
    assert "nvidia.com/gpu" not in str(cluster["headGroupSpec"])
    for group in cluster["workerGroupSpecs"]:
        assert group["replicas"] == group["minReplicas"] == 0 < group["maxReplicas"]
        (container,) = group["template"]["spec"]["containers"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
        assert any(each["key"] == "nvidia.com/gpu" for each in group["template"]["spec"]["tolerations"])


def test_spot_pods_start_first_and_on_demand_pods_replace_them(cluster: dict[str, Any]) -> None:
    """Both groups need the same resources. Priorities and the fallback are those of autoscaler v2."""
    spot, on_demand = cluster["workerGroupSpecs"]
    assert spot["priority"] > on_demand["priority"]
    selectors = [group["template"]["spec"].pop("nodeSelector") for group in (spot, on_demand)]
    assert [list(selector.values()) for selector in selectors] == [["spot"], ["on-demand"]]
    assert spot["template"] == on_demand["template"]
    options = cluster["autoscalerOptions"]
    assert options["version"] == "v2"
    (variable,) = options["env"]
    source = Path(autoscaler.__file__).read_text(encoding="utf-8")
    assert f'"{variable["name"]}"' in source  # Ray reads it


def test_pods_share_one_folder_and_are_drained(cluster: dict[str, Any]) -> None:
    claim = read("shared.yaml")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for pod in pods(cluster):
        (volume,) = pod["volumes"]
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        (container,) = pod["containers"]
        assert container["volumeMounts"] == [{"name": volume["name"], "mountPath": "/shared"}]
        assert pod["terminationGracePeriodSeconds"] >= 60  # docs/reliability.md
        assert "command" not in container  # KubeRay runs `ray start --block`


def test_pods_do_not_run_as_root(cluster: dict[str, Any]) -> None:
    user = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    for pod in pods(cluster):
        assert pod["securityContext"]["runAsNonRoot"]
        assert f"--uid {pod['securityContext']['runAsUser']}" in user


def test_the_job_runs_files_of_the_image_and_resumes() -> None:
    job = read("rayjob.yaml")["spec"]
    program, experiment, _, output = job["entrypoint"].split()[:4]
    for path in (program, experiment):
        assert (ROOT / path.removeprefix("/app/")).is_file()
    assert program.endswith("/sweep-or-resume")
    assert output.startswith("/shared/")
    assert "resources.gpus_per_trial=1" in job["entrypoint"]
    assert job["backoffLimit"] > 0
