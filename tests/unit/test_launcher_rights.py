"""What the head of aws.yaml and gcp.yaml may do. Ray's autoscaler itself starts, tags and ends a
node of aws.yaml at an EC2 of moto's; what it asks for there, the policy allows, and nothing else.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import ray.autoscaler._private.gcp as rays_gcp
import yaml
from moto import mock_aws
from ray.autoscaler._private.aws.config import _check_ami
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config
from ray.autoscaler.tags import TAG_RAY_CLUSTER_NAME

CLUSTER = Path(__file__).parents[2] / "cluster"
POLICY = json.loads((CLUSTER / "launcher-policy.json").read_text())["Statement"]


def launcher(name: str) -> dict[str, Any]:
    config: dict[str, Any] = prepare_config(yaml.safe_load((CLUSTER / name).read_text()))
    return config


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """The calls of AWS that the autoscaler makes for one node, from its start to its end."""
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(key, "stand-in")
    monkeypatch.setenv("MOTO_EC2_LOAD_DEFAULT_AMIS", "false")
    config = launcher("aws.yaml")
    node = dict(config["available_node_types"]["gpu"]["node_config"])
    with mock_aws():
        region = config["provider"]["region"]
        ec2 = boto3.client("ec2", region_name=region)
        node["SubnetIds"] = [ec2.describe_subnets()["Subnets"][0]["SubnetId"]]
        profile = node["IamInstanceProfile"]["Name"]
        boto3.client("iam").create_instance_profile(InstanceProfileName=profile)
        provider = AWSNodeProvider(config["provider"], config["cluster_name"])
        calls: set[str] = set()
        for resource in (provider.ec2, provider.ec2_fail_fast):
            resource.meta.client.meta.events.register(
                "before-call", lambda model, **_: calls.add(f"ec2:{model.name}")
            )
        provider.create_node(node, {"ray-node-type": "worker"}, 1)
        (started,) = provider.non_terminated_nodes({"ray-node-type": "worker"})
        provider.set_node_tags(started, {"ray-node-status": "up-to-date"})
        assert provider.is_running(started)
        provider.terminate_nodes([started])
        assert provider.non_terminated_nodes({}) == []
        yield calls


def test_the_head_may_do_what_the_autoscaler_asks_for_and_no_more(asked: set[str]) -> None:
    # Tags and a role that come with RunInstances are rights of their own, and so is its image.
    beside = {"ec2:CreateTags", "iam:PassRole", "ssm:GetParameters"}
    allowed = {action for statement in POLICY for action in statement["Action"]}
    assert "ec2:RunInstances" in asked
    assert allowed == asked | beside


def test_the_head_touches_nodes_of_its_cluster_alone() -> None:
    config = launcher("aws.yaml")
    of_the_cluster = f"aws:ResourceTag/{TAG_RAY_CLUSTER_NAME}"
    for statement in POLICY:
        assert statement["Effect"] == "Allow"
        if "ec2:TerminateInstances" in statement["Action"]:
            assert statement["Condition"] == {
                "StringEquals": {of_the_cluster: config["cluster_name"]}
            }
        if "iam:PassRole" in statement["Action"]:
            (role,) = statement["Resource"]
            nodes = config["available_node_types"]["gpu"]["node_config"]
            assert role.endswith(f":role/{nodes['IamInstanceProfile']['Name']}")
        if statement["Resource"] == ["*"]:  # AWS knows no narrower one for these
            assert all(action.startswith("ec2:Describe") for action in statement["Action"])


@pytest.mark.parametrize(
    ("name", "key"), [("aws.yaml", "IamInstanceProfile"), ("gcp.yaml", "serviceAccounts")]
)
def test_nodes_cannot_do_what_the_head_may(name: str, key: str) -> None:
    types = launcher(name)["available_node_types"]
    assert types["head"]["node_config"][key] != types["gpu"]["node_config"][key]


def test_ray_keeps_the_image_that_is_named() -> None:
    """Where there is none, it takes one of Ubuntu 18.04."""
    config = launcher("aws.yaml")
    _check_ami(config)
    for node in config["available_node_types"].values():
        assert "ubuntu-24.04" in node["node_config"]["ImageId"]


def test_the_role_on_google_cloud_has_what_the_autoscaler_calls() -> None:
    """Read from Ray's source: there is no Google Cloud to ask."""
    source = (Path(inspect.getfile(rays_gcp)).parent / "node.py").read_text()
    compute = source[source.index("class GCPCompute(") : source.index("class GCPTPU(")]
    called = set(re.findall(r"\.(instances|zoneOperations)\(\)\s*\.(\w+)\(", compute))
    assert ("instances", "insert") in called
    named = {"insert": "create"}
    needed = {f"compute.{kind}.{named.get(method, method)}" for kind, method in called}
    assert launcher("gcp.yaml")["provider"]["cache_stopped_nodes"] is False
    needed -= {"compute.instances.start", "compute.instances.stop"}  # of nodes that are kept
    role = yaml.safe_load((CLUSTER / "launcher-role.yaml").read_text())
    assert needed <= set(role["includedPermissions"])
    # And what an instance of gcp.yaml takes to be inserted: a disk, a network, an account.
    more = set(role["includedPermissions"]) - needed
    assert {permission.rsplit(".", 1)[1] for permission in more} == {
        *("create", "setMetadata", "setServiceAccount", "use", "useExternalIp")
    }
