"""cluster/kubernetes: each overlay is built, and its objects and pods are held against the schemas
that Kubernetes publishes and against what docs/security.md says of them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from manifests import COMPONENTS, KUBERNETES, OVERLAYS, ROOT, build, of_kind, pods, with_components
from operators import (
    ELASTIC,
    QUEUE,
    grows,
    job_and_cluster,
    kuberay_refuses,
    kueue_refuses,
    unknown,
)
from ray._private import ray_constants

from fusegpt_ray import Recipe

VERSION = "1.37"
KUBERAY = ("RayJob", "RayCluster", "RayCronJob")
each_overlay = pytest.mark.parametrize("overlay", OVERLAYS)


def of_kuberay(objects: list[dict[str, Any]]) -> dict[str, Any]:
    (found,) = [item for item in objects if item["kind"] in KUBERAY]
    return found


def validate(item: dict[str, Any]) -> None:
    """Unknown keys are mistakes, too. The pods in KubeRay's objects are those of Kubernetes."""
    if item["kind"] not in KUBERAY:
        kubernetes_validate.validate(item, VERSION, strict=True)
        return
    assert unknown(item) == [] and kuberay_refuses(item) == [] and kueue_refuses(item) == []
    validate_pods(item)


def validate_pods(item: dict[str, Any]) -> None:
    found = list(pods(item["spec"]))
    assert found
    for template in found:
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "template": template}
        kubernetes_validate.validate(pod, VERSION, strict=True)


def test_a_key_that_kubernetes_does_not_know_is_found() -> None:
    (pod, *_) = pods(yaml.safe_load((KUBERNETES / "base/job.yaml").read_text()))
    pod["spec"]["containers"][0]["readOnly"] = True
    with pytest.raises(kubernetes_validate.ValidationError, match="readOnly"):
        validate_pods({"spec": {"template": pod}})


def test_a_key_that_kuberay_does_not_know_is_found() -> None:
    job = yaml.safe_load((KUBERNETES / "base/job.yaml").read_text())
    assert unknown(job) == []
    cluster = job["spec"]["rayClusterSpec"]
    cluster["workerGroupSpecs"][0]["maxReplica"] = 8
    cluster["autoscalerOptions"] = {"idleTimeout": 600}
    job["spec"]["deletionStrategy"]["deletionRules"][0]["condition"]["ttl"] = 60
    assert unknown(job) == [
        "spec.deletionStrategy.deletionRules[0].condition.ttl",
        "spec.rayClusterSpec.workerGroupSpecs[0].maxReplica",
        "spec.rayClusterSpec.autoscalerOptions.idleTimeout",
    ]


def test_what_the_operators_refuse_is_found() -> None:
    """The base with an autoscaler, in a queue."""
    job = yaml.safe_load((KUBERNETES / "base/job.yaml").read_text())
    assert kuberay_refuses(job) == [] and kueue_refuses(job) == []
    job["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"] = True
    assert kuberay_refuses(job) == ["DeleteWorkers where the autoscaler is on"]
    job["metadata"]["labels"] = {QUEUE: "gpus"}
    assert kueue_refuses(job) == [
        "a job that leaves its cluster",
        "an autoscaler without the annotation of an elastic job",
    ]
    job["spec"]["shutdownAfterJobFinishes"] = True
    job["metadata"]["annotations"] = {ELASTIC: "true"}
    assert kueue_refuses(job) == []
    assert "deletionRules beside shutdownAfterJobFinishes" in kuberay_refuses(job)


@each_overlay
def test_objects_and_pods_follow_the_published_schemas(overlay: str) -> None:
    for item in build(KUBERNETES / overlay):
        validate(item)


@each_overlay
def test_pods_are_confined(overlay: str) -> None:
    """As the pod security standard `restricted` asks, and more: nothing but /tmp is written."""
    (uid,) = re.findall(r"^USER (\d+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    objects = build(KUBERNETES / overlay)
    for template in pods(of_kuberay(objects)["spec"]):
        spec = template["spec"]
        user = spec["securityContext"]
        assert user["runAsNonRoot"] and user["runAsUser"] == user["fsGroup"] == int(uid)
        assert user["seccompProfile"] == {"type": "RuntimeDefault"}
        volumes = {volume["name"]: volume.keys() - {"name"} for volume in spec["volumes"]}
        assert {*volumes} >= {"scratch"}
        assert not [kinds for kinds in volumes.values() if kinds & {"hostPath", "secret"}]
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
        for container in spec["containers"]:
            confined = container["securityContext"]
            assert confined["readOnlyRootFilesystem"] and not confined["allowPrivilegeEscalation"]
            assert confined["capabilities"] == {"drop": ["ALL"]}
            writable = [
                mount["mountPath"]
                for mount in container["volumeMounts"]
                if not mount.get("readOnly")
            ]
            assert writable == ["/tmp"]
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes.keys()
            named = {item["name"]: item["value"] for item in container["env"]}
            places = named.keys() & {"HOME", "FUSEGPT_CACHE"}
            assert places and all(named[name].startswith("/tmp/") for name in places)


@each_overlay
def test_only_pods_of_the_cluster_reach_its_ports(overlay: str) -> None:
    objects = build(KUBERNETES / overlay)
    policy = of_kind(objects, "NetworkPolicy")["spec"]
    ours = policy["podSelector"]["matchLabels"]
    assert policy["policyTypes"] == ["Ingress"] and len(ours) == 1
    for rule in policy["ingress"]:
        (who,) = rule["from"]
        if who.keys() == {"podSelector"}:  # of this namespace
            assert who["podSelector"]["matchLabels"] == ours and "ports" not in rule
        else:
            assert who["namespaceSelector"]["matchLabels"]
            assert {entry["port"] for entry in rule["ports"]} <= {8265, 8080}
    for template in pods(of_kuberay(objects)["spec"]):
        assert template["metadata"]["labels"] == ours


@each_overlay
def test_ray_asks_for_a_token_and_the_head_only_drives(overlay: str) -> None:
    _, cluster = job_and_cluster(of_kuberay(build(KUBERNETES / overlay)))
    assert cluster["authOptions"] == {"mode": "token"}
    head = cluster["headGroupSpec"]
    assert head["serviceType"] == "ClusterIP" and "enableIngress" not in head
    assert head["rayStartParams"]["num-cpus"] == head["rayStartParams"]["num-gpus"] == "0"
    # Only the autoscaler needs the rights of an account.
    assert head["template"]["spec"]["automountServiceAccountToken"] is grows(cluster)
    for group in cluster["workerGroupSpecs"]:
        assert group["template"]["spec"]["automountServiceAccountToken"] is False


@each_overlay
def test_the_recipe_is_where_the_job_looks_for_it(overlay: str) -> None:
    objects = build(KUBERNETES / overlay)
    found = [item for item in objects if item["kind"] == "ConfigMap"]
    if overlay == "base":
        assert not found
        return
    (recipe,) = found
    parsed = Recipe.parse(yaml.safe_load(recipe["data"]["recipe.yaml"]))
    job, cluster = job_and_cluster(of_kuberay(objects))
    if job is not None:
        assert job["entrypoint"].split()[-1] == "/recipe/recipe.yaml"
        assert "runtimeEnvYAML" not in job
    group = cluster["workerGroupSpecs"][0]
    (container,) = group["template"]["spec"]["containers"]
    gpus = int(container["resources"]["limits"].get("nvidia.com/gpu", 0)) * group["maxReplicas"]
    assert gpus == parsed.cluster.replicas * (parsed.cluster.gpus_per_replica or 0)
    assert recipe["metadata"]["name"] == "recipe"


@each_overlay
def test_an_autoscaler_knows_labels_and_has_somewhere_to_write(overlay: str) -> None:
    """Version 1 brings no node for a task that asks for a label."""
    _, cluster = job_and_cluster(of_kuberay(build(KUBERNETES / overlay)))
    assert grows(cluster) is ("autoscalerOptions" in cluster)
    if grows(cluster):
        options = cluster["autoscalerOptions"]
        assert options["version"] == "v2"
        assert options["volumeMounts"] == [{"name": "scratch", "mountPath": "/tmp"}]


@each_overlay
def test_a_worker_that_is_stopped_has_time_to_drain(overlay: str) -> None:
    """Ray drains its node upon SIGTERM, and Kubernetes kills what is not gone by then."""
    assert ray_constants.RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S > 0
    _, cluster = job_and_cluster(of_kuberay(build(KUBERNETES / overlay)))
    for group in cluster["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        named = {item["name"]: item["value"] for item in container["env"]}
        drains = int(named["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        assert 60 < drains < pod["terminationGracePeriodSeconds"] - 20


def test_these_are_the_components() -> None:
    assert {"family", "keys", "nvme", "queue", "tls"} == COMPONENTS


@each_overlay
def test_a_queue_and_keys_can_be_added_to_any(overlay: str, tmp_path: Path) -> None:
    objects = with_components(tmp_path, overlay, "queue", "keys")
    for item in objects:
        validate(item)
    ours = of_kuberay(objects)
    assert kueue_refuses(ours, queued=True) == []
    if ours["kind"] != "RayCronJob":  # its jobs get no labels of it
        assert ours["metadata"]["labels"] == {QUEUE: "gpus"}
    job, cluster = job_and_cluster(ours)
    if job is not None:
        assert job["shutdownAfterJobFinishes"] and "deletionStrategy" not in job
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        assert container["envFrom"] == [{"secretRef": {"name": "s3"}}]


@each_overlay
def test_a_family_disks_and_encryption_can_be_added_to_any(overlay: str, tmp_path: Path) -> None:
    objects = with_components(tmp_path, overlay, "family", "nvme", "tls")
    for item in objects:
        validate(item)
    job, cluster = job_and_cluster(of_kuberay(objects))
    if job is not None:
        program, script, recipe = job["entrypoint"].split()
        assert (program, recipe) == ("python", "/recipe/recipe.yaml")
        assert Path(script) == Path("/app/jobs/compress_family.py")
        assert (ROOT / Path(script).relative_to("/app")).is_file()
    assert cluster["tlsOptions"] == {"enabled": True}
    for group in cluster["workerGroupSpecs"]:
        (scratch,) = [
            volume for volume in group["template"]["spec"]["volumes"] if volume["name"] == "scratch"
        ]
        claim = scratch["ephemeral"]["volumeClaimTemplate"]["spec"]
        assert claim["storageClassName"] == "local-nvme"
