"""What the integration tests share: a tiny model with its texts, an S3 server, and one local Ray that knows how to reach it."""

from __future__ import annotations

import logging
import os
import random
import re
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest
import ray
import torch
import transformers as tf
from models import GROUPED, randomize
from s3fs import S3FileSystem
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

os.environ["OMP_NUM_THREADS"] = "1"  # for what the tests start: the same threads everywhere, so the same sums

BLOCKS = 8
WORDS = [a + b for a in ("ba", "de", "fi", "go", "lu", "ma", "ne", "po", "ri", "sa") for b in ("ba", "de", "fi", "go", "lu", "ma")]
SETTINGS: dict[str, Any] = {
    "sparsity": [0.125, 0.25],  # one and two of the eight blocks
    "calibration": {"windows": 16, "length": 24},
    "evaluation": {"heldout": {"length": 32}},
    "importance": {"windows": 8, "batch": 2},
    # Rates at which a few steps change the tiny model visibly.
    "fusion": {
        "group_size": 3,
        "rank": 4,
        "lora_rank": 4,
        "epochs": 3,
        "batch": 4,
        "learning_rate": 0.02,
        "lora_learning_rate": 0.01,
    },
    "cluster": {"engine": "local"},
}


@dataclass(frozen=True)
class Material:
    """A tiny model in float32 and in bfloat16, with texts for it."""

    model: Path
    model_bf16: Path
    calibration: Path
    heldout: Path

    def recipe(self, output: Path | str, **changes: Any) -> dict[str, Any]:
        """A recipe as in its YAML file; `changes` replace values, and within sections the keys they name."""
        files = {
            "model": {"source": str(self.model)},
            "calibration": {"data": str(self.calibration)},
            "evaluation": {"heldout": {"data": str(self.heldout)}},
            "output": {"uri": str(output), "name": "tiny"},
        }
        return _merge(_merge(SETTINGS, files), changes)


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes`, mapping by mapping."""
    both = {key: _merge(base[key], value) if isinstance(value, dict) and key in base else value for key, value in changes.items()}
    return {**base, **both}


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    folder = tmp_path_factory.mktemp("material")
    calibration, heldout = folder / "calibration.txt", folder / "heldout.txt"
    calibration.write_text(_text(words=2000, seed=1))
    heldout.write_text(_text(words=500, seed=2))
    return Material(_model(folder / "float32", torch.float32), _model(folder / "bfloat16", torch.bfloat16), calibration, heldout)


def _model(folder: Path, dtype: torch.dtype) -> Path:
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED | {"num_hidden_layers": BLOCKS}, tie_word_embeddings=False))
    randomize(model)
    model.to(dtype).save_pretrained(folder)
    words = Tokenizer(WordLevel({word: n for n, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", ".", *WORDS])}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    tf.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


def _text(words: int, seed: int) -> str:
    """Sentences, a line each, in which a word is often followed by one of its two successors."""
    draw = random.Random(seed)
    said, word = [], 0
    for n in range(words):
        word = (3 * word + draw.choice([1, 2])) % len(WORDS) if draw.random() < 0.8 else draw.randrange(len(WORDS))
        said.append(WORDS[word] + (" .\n" if n % 12 == 11 else " "))
    return "".join(said)


# --- S3 and Ray ---

REQUEST = re.compile(r'"(?:\x1b\[\d+m)*([A-Z]+) (\S+) HTTP')


@dataclass(frozen=True)
class S3:
    """An S3 server on this machine. Every process finds it and its keys in the environment, as with a real one."""

    client: Any
    """boto3's, by which the tests look at what is there."""
    keys: tuple[str, str]
    """The access key and the secret key: nothing that a run writes may hold them."""
    log: Path

    def requests(self) -> list[tuple[str, str]]:
        """Every request so far, in the order in which they were answered: method and path."""
        return REQUEST.findall(self.log.read_text())

    def objects(self, bucket: str) -> dict[str, bytes]:
        """All objects of a bucket."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=bucket)
        found = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
        return {key: self.client.get_object(Bucket=bucket, Key=key)["Body"].read() for key in found}

    def upload(self, files: Iterable[Path], bucket: str, prefix: str) -> None:
        for file in files:
            self.client.upload_file(str(file), bucket, f"{prefix}/{file.name}")


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    keys = ("PLANTED-ACCESS-KEY-7d1c", "PLANTED-SECRET-KEY-93ab")
    port, log = free_port(), tmp_path_factory.mktemp("s3") / "log"
    with pytest.MonkeyPatch.context() as patch, log.open("w") as out:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": keys[0],
            "AWS_SECRET_ACCESS_KEY": keys[1],
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            patch.setenv(name, value)
        S3FileSystem.clear_instance_cache()
        server = subprocess.Popen([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], stdout=out, stderr=out)
        try:
            _wait_for(port, server)
            yield S3(boto3.client("s3"), keys, log)
        finally:
            server.kill()
            server.wait()
            S3FileSystem.clear_instance_cache()


@pytest.fixture
def bucket(s3: S3) -> str:
    """The name of a new, empty bucket."""
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    s3.client.create_bucket(Bucket=name)
    S3FileSystem.clear_instance_cache()
    return name


@pytest.fixture(scope="session")
def ray_session(s3: S3) -> Iterator[None]:
    """One local Ray for all tests. It starts after the S3 server, because workers inherit the environment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.delenv("RAY_ADDRESS", raising=False)
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            object_store_memory=500_000_000,
            log_to_driver=False,
        )
        logging.getLogger("ray.data").setLevel(logging.WARNING)  # else a failed test shows pages of its metrics
        yield
        ray.shutdown()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session", name="free_port")
def _free_port() -> Callable[[], int]:
    return free_port


def _wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and server.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise RuntimeError(f"nothing answers on port {port}")
