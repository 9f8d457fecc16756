"""What KubeRay and Kueue refuse, as they do it themselves: their webhooks and controllers run in a
cluster alone, and KubeRay's schemas are a megabyte each. The fields are those of the API reference
of KubeRay v1.7; the rules are those of its `validation.go`, and of Kueue's webhooks for RayJob and
RayCluster.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

Object = dict[str, Any]

ELASTIC = "kueue.x-k8s.io/elastic-job"
QUEUE = "kueue.x-k8s.io/queue-name"
NOT_LOOKED_INTO: Any = None
"""Objects of Kubernetes, which have schemas of their own, and maps with keys of anyone's."""

GROUP: Object = {
    **dict.fromkeys(("template", "resources", "labels", "rayStartParams"), NOT_LOOKED_INTO)
}
CLUSTER: Object = {
    **dict.fromkeys(("rayVersion", "suspend", "managedBy", "headServiceAnnotations")),
    "enableInTreeAutoscaling": NOT_LOOKED_INTO,
    "upgradeStrategy": {"type": NOT_LOOKED_INTO},
    "tlsOptions": {"enabled": NOT_LOOKED_INTO},
    "authOptions": dict.fromkeys(("mode", "secretName", "enableK8sTokenAuth")),
    "autoscalerOptions": {
        **dict.fromkeys(("resources", "image", "imagePullPolicy", "securityContext")),
        **dict.fromkeys(("idleTimeoutSeconds", "upscalingMode", "version", "env", "envFrom")),
        **dict.fromkeys(("volumeMounts", "command", "args")),
    },
    "headGroupSpec": {
        **GROUP,
        **dict.fromkeys(("serviceType", "headService", "enableIngress", "ingressOptions")),
    },
    "workerGroupSpecs": [
        {
            **GROUP,
            **dict.fromkeys(("groupName", "replicas", "minReplicas", "maxReplicas", "numOfHosts")),
            **dict.fromkeys(("suspend", "idleTimeoutSeconds", "priority")),
            "scaleStrategy": {"workersToDelete": NOT_LOOKED_INTO},
        }
    ],
}
JOB: Object = {
    **dict.fromkeys(("entrypoint", "runtimeEnvYAML", "jobId", "submissionMode", "metadata")),
    **dict.fromkeys(("entrypointNumCpus", "entrypointNumGpus", "entrypointResources")),
    **dict.fromkeys(("activeDeadlineSeconds", "preRunningDeadlineSeconds", "backoffLimit")),
    **dict.fromkeys(("ttlSecondsAfterFinished", "shutdownAfterJobFinishes", "suspend")),
    **dict.fromkeys(("clusterSelector", "managedBy", "submitterPodTemplate")),
    "submitterConfig": {"backoffLimit": NOT_LOOKED_INTO},
    "deletionStrategy": {
        "deletionRules": [
            {
                "policy": NOT_LOOKED_INTO,
                "condition": dict.fromkeys(("jobStatus", "jobDeploymentStatus", "ttlSeconds")),
            }
        ]
    },
    "rayClusterSpec": CLUSTER,
}
CRON: Object = {**dict.fromkeys(("schedule", "timeZone", "suspend")), "jobTemplate": JOB}
KEYS = {"RayJob": JOB, "RayCluster": CLUSTER, "RayCronJob": CRON}

DELETED_IN_ORDER = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")


def unknown(item: Object) -> list[str]:
    """The paths of keys that KubeRay does not know, and would drop or refuse."""
    top = [key for key in item if key not in ("apiVersion", "kind", "metadata", "spec")]
    return top + list(_unknown(item["spec"], KEYS[item["kind"]], "spec"))


def _unknown(value: Any, known: Any, path: str) -> Iterator[str]:
    if isinstance(known, list):
        for index, element in enumerate(value):
            yield from _unknown(element, known[0], f"{path}[{index}]")
    elif known is not NOT_LOOKED_INTO:
        for key, below in value.items():
            if key in known:
                yield from _unknown(below, known[key], f"{path}.{key}")
            else:
                yield f"{path}.{key}"


def job_and_cluster(item: Object) -> tuple[Object | None, Object]:
    """The specification of the job in any of KubeRay's objects, and of the cluster."""
    if item["kind"] == "RayCluster":
        return None, item["spec"]
    job = item["spec"].get("jobTemplate", item["spec"])
    return job, job["rayClusterSpec"]


def grows(cluster: Object) -> bool:
    return bool(cluster.get("enableInTreeAutoscaling", False))


def kuberay_refuses(item: Object) -> list[str]:
    """Why; nothing, if it takes the object."""
    job, cluster = job_and_cluster(item)
    said = list(_of_the_cluster(cluster))
    return said if job is None else said + list(_of_the_job(job, grows(cluster)))


def _of_the_job(job: Object, growing: bool) -> Iterator[str]:
    shuts_down = job.get("shutdownAfterJobFinishes", False)
    if job.get("ttlSecondsAfterFinished", 0) and not shuts_down:
        yield "ttlSecondsAfterFinished without shutdownAfterJobFinishes"
    if "deletionStrategy" not in job:
        return
    rules = job["deletionStrategy"]["deletionRules"]
    if shuts_down:
        yield "deletionRules beside shutdownAfterJobFinishes"
    seconds: dict[str, dict[str, int]] = {}
    for rule in rules:
        policy, condition = rule["policy"], rule["condition"]
        if policy == "DeleteWorkers" and growing:
            yield "DeleteWorkers where the autoscaler is on"
        of_this = seconds.setdefault(condition["jobStatus"], {})
        if policy in of_this:
            yield f"two rules {policy} for {condition['jobStatus']}"
        of_this[policy] = condition["ttlSeconds"]
    for status, of_this in seconds.items():
        order = [
            of_this[p] for p in ("DeleteWorkers", "DeleteCluster", "DeleteSelf") if p in of_this
        ]
        if any(earlier > later for earlier, later in pairwise(order)):
            yield f"{status}: the cluster goes before its workers, or the job before its cluster"


def _of_the_cluster(cluster: Object) -> Iterator[str]:
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        start = group["rayStartParams"]
        if "labels" in start:
            yield "labels in rayStartParams"
        if group.get("resources") and start.keys() & {"num-cpus", "num-gpus", "memory"}:
            yield "resources beside those in rayStartParams"
        if grows(cluster) and group["template"]["spec"].get("restartPolicy", "Never") != "Never":
            yield "a restartPolicy where the autoscaler is on"
    for group in cluster["workerGroupSpecs"]:
        if not 0 <= group["minReplicas"] <= group["maxReplicas"]:
            yield "minReplicas above maxReplicas"
    version = tuple(map(int, cluster["rayVersion"].split(".")))
    if cluster["authOptions"]["mode"] == "token" and version < (2, 52, 0):
        yield "tokens before Ray 2.52"


def kueue_refuses(item: Object, *, queued: bool = False) -> list[str]:
    """Why; nothing, if it takes the object, or leaves it alone because it names no queue.
    `queued`: it goes to one all the same, as the jobs of a RayCronJob go to the queue `default`.
    """
    metadata = item["metadata"]
    if not queued and QUEUE not in metadata.get("labels", {}):
        return []
    job, cluster = job_and_cluster(item)
    said = []
    if job is not None and not job.get("shutdownAfterJobFinishes", False):
        said.append("a job that leaves its cluster")
    if grows(cluster) and metadata.get("annotations", {}).get(ELASTIC) != "true":
        said.append("an autoscaler without the annotation of an elastic job")
    if any(group["groupName"] == "head" for group in cluster["workerGroupSpecs"]):
        said.append("workers named head")
    return said
