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

from fusegpt_ray import Recipe

VERSION = "1.37"
KUBERAY = ("RayJob", "RayCluster", "RayCronJob")
each_overlay = pytest.mark.parametrize("overlay", OVERLAYS)


def validate(item: dict[str, Any]) -> None:
    """Unknown keys are mistakes, too. Of KubeRay's objects, the pods are looked at."""
    if item["kind"] not in KUBERAY:
        kubernetes_validate.validate(item, VERSION, strict=True)
        return
    found = list(pods(item["spec"]))
    assert found
    for template in found:
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "template": template}
        kubernetes_validate.validate(pod, VERSION, strict=True)


def test_a_key_that_kubernetes_does_not_know_is_found() -> None:
    (pod, *_) = pods(yaml.safe_load((KUBERNETES / "base/job.yaml").read_text()))
    pod["spec"]["containers"][0]["readOnly"] = True
    with pytest.raises(kubernetes_validate.ValidationError, match="readOnly"):
        validate({"kind": "RayJob", "spec": {"template": pod}})


@each_overlay
def test_objects_and_pods_follow_the_published_schemas(overlay: str) -> None:
    for item in build(KUBERNETES / overlay):
        validate(item)


@each_overlay
def test_pods_are_confined(overlay: str) -> None:
    """As the pod security standard `restricted` asks, and more: nothing but /tmp is written."""
    (uid,) = re.findall(r"^USER (\d+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    objects = build(KUBERNETES / overlay)
    (ours,) = [item for item in objects if item["kind"] in KUBERAY]
    for template in pods(ours["spec"]):
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
            assert all(value.startswith("/tmp/") for value in named.values())


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
    (found,) = [item for item in objects if item["kind"] in KUBERAY]
    for template in pods(found["spec"]):
        assert template["metadata"]["labels"] == ours


@each_overlay
def test_ray_asks_for_a_token_and_the_head_only_drives(overlay: str) -> None:
    (found,) = [item for item in build(KUBERNETES / overlay) if item["kind"] in KUBERAY]
    spec = found["spec"].get("jobTemplate", found["spec"])
    cluster = spec.get("rayClusterSpec", spec)
    assert cluster["authOptions"] == {"mode": "token"}
    head = cluster["headGroupSpec"]
    assert head["serviceType"] == "ClusterIP" and "enableIngress" not in head
    assert head["rayStartParams"]["num-cpus"] == head["rayStartParams"]["num-gpus"] == "0"
    # Only the autoscaler needs the rights of an account.
    grows = cluster.get("enableInTreeAutoscaling", False)
    assert head["template"]["spec"]["automountServiceAccountToken"] is grows
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
    (ours,) = [item for item in objects if item["kind"] in KUBERAY]
    spec = ours["spec"].get("jobTemplate", ours["spec"])
    if "entrypoint" in spec:
        assert spec["entrypoint"].split()[-1] == "/recipe/recipe.yaml"
        assert "runtimeEnvYAML" not in spec
    group = spec.get("rayClusterSpec", spec)["workerGroupSpecs"][0]
    (container,) = group["template"]["spec"]["containers"]
    gpus = int(container["resources"]["limits"].get("nvidia.com/gpu", 0)) * group["maxReplicas"]
    assert gpus == parsed.cluster.replicas * (parsed.cluster.gpus_per_replica or 0)
    assert recipe["metadata"]["name"] == "recipe"


@each_overlay
def test_a_queue_and_keys_can_be_added_to_any(overlay: str, tmp_path: Path) -> None:
    assert {"keys", "nvme", "queue"} == COMPONENTS
    objects = with_components(tmp_path, overlay, "queue", "keys")
    for item in objects:
        validate(item)
    (ours,) = [item for item in objects if item["kind"] in KUBERAY]
    if ours["kind"] != "RayCronJob":  # its jobs get no labels of it
        assert ours["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "gpus"}
    spec = ours["spec"].get("jobTemplate", ours["spec"])
    cluster = spec.get("rayClusterSpec", spec)
    if cluster is not spec:
        assert spec["shutdownAfterJobFinishes"] and "deletionStrategy" not in spec
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        assert container["envFrom"] == [{"secretRef": {"name": "s3"}}]
