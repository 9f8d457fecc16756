"""A URI that holds a secret would be written into journals, manifests, cards and logs: it is
refused, and the message hides it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from desk import LENGTH, Desk
from mistakes import MESSAGE, tree

from fusegpt_ray.cli import main
from fusegpt_ray.store.retry import cleaned
from fusegpt_ray.uris import secret_in

SECRET = "wJalrXUtnFEMI"
SECRETS = [
    f"s3://AKIAKEY:{SECRET}@bucket/model",
    f"s3://AKIAKEY:{SECRET}/K7MDENG@bucket/model",
    f"S3://{SECRET}@bucket/model",
    f"simplecache::s3://AKIAKEY:{SECRET}@bucket/model",
    f"zip://model.json::https://{SECRET}@host/model.zip",
    f"https://user:{SECRET}@host/model",
    f"https://{SECRET}@host/model",
    f"https://host/model?token={SECRET}",
    f"https://host/model?X-Amz-Signature={SECRET}&X-Amz-Date=2026",
    f"https://host/model?sv=2024&{SECRET}",
    f"s3://bucket/model?AWSAccessKeyId=a&Signature={SECRET}",
    f"ftp://user:{SECRET}@host/model",
    f"abfs://container:{SECRET}@account.dfs.core.windows.net/model",
]
FINE = [
    "meta-llama/Llama-2-7b-hf",
    "/models/a@b?c=d",
    "C:\\models",
    "s3://bucket/model",
    "s3://bucket/a@b/text-0?.jsonl",
    "gs://bucket/model",
    "https://host:8443/model",
    "http://[::1]:9000/model",
    "hf://datasets/user/name@main/text.txt",
    "abfs://container@account.dfs.core.windows.net/model",
    "sftp://user@host:22/model",
    "github://org:repo@main/text.txt",
    "simplecache::s3://bucket/text.txt",
    "zip://*.txt::s3://bucket/texts.zip",
    "127.0.0.1:6379",
    "ray://127.0.0.1:10001",
]


@pytest.mark.parametrize("uri", FINE)
def test_what_is_no_secret(uri: str) -> None:
    assert secret_in(uri) == ""


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("https://user:p@ss@host/x", "https://***@host/x"),
        (
            "at s3://key@bucket/a@b, not s3://p@q@bucket/c",
            "at s3://***@bucket/a@b, not s3://***@bucket/c",
        ),
        ("no user: https://host/a@b https://host", "no user: https://host/a@b https://host"),
        (f"403 for {SECRET}", "403 for ***"),
    ],
)
def test_what_is_said_is_cleaned(said: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    assert cleaned(said) == told


KEYS = {
    "model.source": "model={{source: '{}'}}",
    "output.uri": "output.uri={}",
    "calibration.data": "calibration.data={}",
    "calibration.data.1.data": "calibration.data=[{{data: a.txt}}, {{data: '{}'}}]",
    "evaluation.a.data": "evaluation={{a: {{data: '{}'}}}}",
    "cluster.address": "cluster.address={}",
}


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    assert main(arguments) == 2
    stdout, stderr = capsys.readouterr()
    assert SECRET not in stdout + stderr and "AKIAKEY" not in stdout + stderr
    message = MESSAGE.fullmatch(stderr.rstrip("\n"))
    assert message, stderr
    assert "credentials come from the environment" in message["fix"] and "…" in message["value"]
    return message.groupdict()


@pytest.mark.parametrize("uri", SECRETS)
@pytest.mark.parametrize("key", KEYS)
def test_a_recipe_with_a_secret(
    key: str, uri: str, desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = desk.write()
    before = tree(desk.folder)
    assert refused(["compress", recipe, "--set", KEYS[key].format(uri)], capsys)["key"] == key
    assert tree(desk.folder) == before


@pytest.mark.parametrize("uri", SECRETS[:3])
@pytest.mark.parametrize("verb", ["pull", "verify", "status", "clean", "evaluate", "--data"])
def test_an_argument_with_a_secret(
    verb: str, uri: str, desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = {
        "pull": ["pull", uri, "here"],
        "evaluate": ["evaluate", uri, "--data", "heldout.txt", "--length", str(LENGTH)],
    }
    asked["--data"] = ["evaluate", "model", "--data", uri, "--length", str(LENGTH)]
    key = {"evaluate": "MODEL", "--data": "--data"}.get(verb, "URI")
    assert refused(asked.get(verb, [verb, uri]), capsys)["key"] == key
    assert not Path("here").exists()


def test_a_secret_where_no_uri_belongs(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever is wrong with a key, its value is not shown when it holds one."""
    for setting in (
        "model.sorce={}",
        "seed={}",
        "cluster={}",
        "evaluation.a={}",
        "model.source: {}",
    ):
        assert main(["compress", desk.write(), "--set", setting.format(SECRETS[0])]) == 2
        assert SECRET not in capsys.readouterr().err
    (desk.folder / "own.yaml").write_text(f"model:\n  source: {SECRETS[0]}\n bad: [\n")
    assert main(["compress", "own.yaml"]) == 2
    assert SECRET not in capsys.readouterr().err
