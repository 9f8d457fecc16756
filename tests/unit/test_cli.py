"""The `fusegpt` command on a tiny model: what it prints, what it exits with, and whether its numbers are true."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from models import DEPTH, VOCAB, hidden_states, load_model, without_blocks
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fusegpt_ray.cli import main

SPECIAL = ["<pad>", "<s>", "</s>"]
LENGTH = 12
"""Tokens a window."""


def add_tokenizer(folder: Path) -> None:
    """A tokenizer beside a tiny model: the word w17 is token 17."""
    words = [*SPECIAL, *(f"w{number}" for number in range(len(SPECIAL), VOCAB))]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(zip(("pad_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def text_of(ids: torch.Tensor) -> str:
    """The text that the tokenizer above turns into these tokens, ten words a line."""
    words = [f"w{number}" for number in ids.tolist()]
    return "\n".join(" ".join(words[first : first + 10]) for first in range(0, len(words), 10)) + "\n"


def random_text(tokens: int, seed: int) -> str:
    return text_of(torch.randint(len(SPECIAL), VOCAB, (tokens,), generator=torch.Generator().manual_seed(seed)))


@dataclass(frozen=True)
class Desk:
    """A user's folder: a tiny model with a tokenizer, two texts, and a recipe that makes the model shallower."""

    folder: Path

    @classmethod
    def make(cls, folder: Path, checkpoint: Path) -> Desk:
        shutil.copytree(checkpoint, folder / "model")
        add_tokenizer(folder / "model")
        (folder / "calibration.txt").write_text(random_text(200, seed=1))
        (folder / "heldout.txt").write_text(random_text(5 * LENGTH + 7, seed=2))
        return cls(folder)

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def heldout(self) -> Path:
        return self.folder / "heldout.txt"

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def recipe(self, **changes: Any) -> dict[str, Any]:
        """The recipe, with whole sections or keys replaced."""
        return {
            "model": {"source": str(self.model)},
            "sparsity": 0.4,
            "calibration": {"data": str(self.folder / "calibration.txt"), "windows": 8, "length": LENGTH},
            "importance": {"windows": 4, "batch": 2},
            "fusion": {"group_size": 3, "rank": 2, "lora_rank": 2, "epochs": 2, "batch": 4},
            "cluster": {"engine": "local"},
            "output": {"uri": str(self.out), "name": "demo"},
        } | changes

    def write(self, **changes: Any) -> str:
        """Write the recipe; returns the file's path."""
        path = self.folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(self.recipe(**changes)))
        return str(path)


@pytest.fixture
def desk(checkpoint: Callable[[str], Path], tmp_path: Path) -> Desk:
    return Desk.make(tmp_path, checkpoint("llama"))


def windows_of(desk: Desk, windows: int) -> torch.Tensor:
    """The first calibration windows, as the paper's code draws them."""
    ids = tokens_of(desk.folder / "calibration.txt")
    draw = random.Random(0)
    starts = [draw.randint(0, len(ids) - LENGTH - 1) for _ in range(windows)]
    return torch.stack([ids[start : start + LENGTH] for start in starts])


def tokens_of(text: Path) -> torch.Tensor:
    return torch.tensor([int(word.removeprefix("w")) for word in text.read_text().split()])


def macro_influence(model: PreTrainedModel, ids: torch.Tensor) -> list[float]:
    """1 − the mean cosine between what enters the final norm with and without each block, one full forward pass each."""
    blocks = range(model.config.num_hidden_layers)
    full = hidden_states(model, "llama", ids)[-1].double()
    without = [hidden_states(without_blocks(model, "llama", [b for b in blocks if b != out]), "llama", ids)[-1] for out in blocks]
    return [1 - torch.cosine_similarity(full, states.double(), dim=-1).mean().item() for states in without]


@torch.no_grad()
def perplexity(model: PreTrainedModel, text: Path, windows: int | None = None) -> float:
    """exp of the mean of the windows' mean losses; the windows follow each other and the tail is left out."""
    losses = []
    for window in list(tokens_of(text).split(LENGTH))[:windows]:
        if len(window) == LENGTH:
            logits = model(input_ids=window[None]).logits[0]
            losses.append(torch.nn.functional.cross_entropy(logits[:-1], window[1:]).item())
    return math.exp(sum(losses) / len(losses))


def assert_plain(stderr: str) -> None:
    """Lines of a log file: nothing moves, nothing is coloured."""
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", stderr), stderr


# --- compress ---


@dataclass(frozen=True)
class Finished:
    """What one `fusegpt compress` left behind."""

    desk: Desk
    stdout: str
    stderr: str

    def folder(self, percent: int) -> Path:
        return self.desk.out / f"demo-p{percent}"

    def manifest(self, percent: int) -> dict[str, Any]:
        return json.loads((self.folder(percent) / "fusegpt.json").read_text())


@pytest.fixture(scope="module")
def finished(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run that publishes two models on its way, evaluated, in small shards."""
    desk = Desk.make(tmp_path_factory.mktemp("compress"), checkpoint("llama"))
    recipe = desk.write(sparsity=[0.4, 0.2], evaluation={"held-out": {"data": str(desk.heldout)}})
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        assert main(["compress", recipe, "--set", "output.shard_gb=0.00004", "--set", "fusion.learning_rate=0.01"]) == 0
    return Finished(desk, stdout.getvalue(), stderr.getvalue())


def test_compress_leaves_finished_models_and_nothing_else(finished: Finished) -> None:
    assert sorted(path.name for path in finished.desk.out.iterdir()) == ["demo-p20", "demo-p40"]  # the run's own folder is gone
    for percent, depth in ((20, DEPTH - 1), (40, DEPTH - 2)):
        assert load_model(finished.folder(percent)).config.num_hidden_layers == depth
        assert len(list(finished.folder(percent).glob("model-*.safetensors"))) > 1
        assert (finished.folder(percent) / "tokenizer.json").exists()


def test_compress_removes_the_lowest_block_each_round(finished: Finished) -> None:
    manifest = finished.manifest(40)
    scores = macro_influence(load_model(finished.desk.model), windows_of(finished.desk, 4))
    assert manifest["removed"][0] == scores.index(min(scores))
    check_scores(manifest["rounds"][0], dict(enumerate(scores)))
    assert manifest["removed"] == [record["removed"] for record in manifest["rounds"]]
    assert manifest["kept"] == [block for block in range(DEPTH) if block not in manifest["removed"]]
    assert finished.manifest(20)["removed"] == manifest["removed"][:1]

    # The second round scores the model that the first one published.
    once = load_model(finished.folder(20))
    again = dict(zip(finished.manifest(20)["kept"], macro_influence(once, windows_of(finished.desk, 4)), strict=True))
    check_scores(manifest["rounds"][1], again)
    assert manifest["removed"][1] == min(again, key=again.__getitem__)


def check_scores(record: dict[str, Any], expected: dict[int, float]) -> None:
    """Each block is scored, or was stopped when it was above the lowest and not yet above its score."""
    scores = {int(block): score for block, score in record["scores"].items()}
    assert scores == pytest.approx({block: expected[block] for block in scores}, rel=1e-4)
    assert sorted([*scores, *map(int, record["stopped"])]) == sorted(expected)
    for block, item in record["stopped"].items():
        assert min(scores.values()) < item["at_least"] <= expected[int(block)] * (1 + 1e-4)


@pytest.mark.parametrize("percent", [20, 40])
def test_compress_reports_true_perplexities(percent: int, finished: Finished) -> None:
    dense, manifest = load_model(finished.desk.model), finished.manifest(percent)
    expected = {
        "dense": perplexity(dense, finished.desk.heldout),
        "dropped": perplexity(without_blocks(dense, "llama", manifest["kept"]), finished.desk.heldout),
        "fused": perplexity(load_model(finished.folder(percent)), finished.desk.heldout),
        "length": LENGTH,
    }
    assert manifest["perplexity"]["held-out"] == pytest.approx(expected, rel=1e-4)
    assert abs(expected["fused"] - expected["dropped"]) > 0.01, "or nothing was trained"
    card = (finished.folder(percent) / "README.md").read_text()
    assert " | ".join(f"{expected[key]:.2f}" for key in ("dense", "dropped", "fused")) in card


def test_compress_talks_on_stderr_in_plain_lines(finished: Finished) -> None:
    assert finished.stdout == ""
    assert_plain(finished.stderr)
    lines = finished.stderr.splitlines()
    assert lines[0] == f"{finished.desk.model}: 5 blocks, 2 to remove (fusegpt)"
    assert [line.partition(":")[0] for line in lines if line.startswith("round ") and "scoring" in line] == ["round 1/2", "round 2/2"]
    assert [line for line in lines if line.startswith("published ")] == [f"published {finished.folder(p)}" for p in (20, 40)]
    for number, record in enumerate(finished.manifest(40)["rounds"], 1):
        assert any(line.startswith(f"round {number}: fusing blocks") for line in lines)
        assert f"  epoch 2/2  loss {record['loss_last']:.4g}" in lines
    assert len(lines) < 40


def test_the_last_table_tells_the_models_apart(finished: Finished) -> None:
    for percent in (20, 40):
        row = finished.manifest(percent)["perplexity"]["held-out"]
        numbers = [f"{row[key]:.2f}" for key in ("dense", "dropped", "fused")]
        (line,) = [line for line in finished.stderr.splitlines() if all(number in line for number in numbers)]
        assert f"demo-p{percent}" in line


# --- score ---


def test_score_prints_one_json_object_with_true_scores(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", desk.write(), "--json"]) == 0
    stdout, stderr = capsys.readouterr()
    result = json.loads(stdout)
    assert set(result) == {"metric", "blocks", "lowest"} and stdout.count("\n") == 1
    assert result["metric"] == "macro_influence"
    assert [set(row) for row in result["blocks"]] == [{"block", "score"}] * DEPTH
    assert [row["block"] for row in result["blocks"]] == list(range(DEPTH))
    expected = macro_influence(load_model(desk.model), windows_of(desk, 4))
    assert [row["score"] for row in result["blocks"]] == pytest.approx(expected, rel=1e-4)
    assert result["lowest"] == expected.index(min(expected))
    assert_plain(stderr)
    assert "scoring 5 blocks on 4 windows" in stderr
    assert not desk.out.exists()


@pytest.mark.parametrize("racing", [None, 0.5])
def test_score_prints_the_full_table(racing: float | None, desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", desk.write(importance={"windows": 4, "batch": 1, "racing": racing})]) == 0
    table = capsys.readouterr().out
    scores = macro_influence(load_model(desk.model), windows_of(desk, 4))
    rows = {int(block): float(score) for block, score in re.findall(r"│ *(\d+) *│ *([\d.]+)", table)}
    assert rows == pytest.approx(dict(enumerate(scores)), rel=1e-4, abs=1e-6)
    (marked,) = re.findall(r"│ *(\d+) .*← lowest", table)
    assert int(marked) == scores.index(min(scores))


# --- evaluate ---


def evaluate(desk: Desk, *arguments: str) -> list[str]:
    return ["evaluate", str(desk.model), "--data", str(desk.heldout), "--length", str(LENGTH), *arguments]


@pytest.mark.parametrize("windows", [None, 2])
def test_evaluate_gives_the_perplexity(windows: int | None, desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    limit = [] if windows is None else ["--windows", str(windows)]
    assert main(evaluate(desk, "--json", *limit)) == 0
    stdout, stderr = capsys.readouterr()
    result = json.loads(stdout)
    assert stdout.count("\n") == 1
    assert result.pop("perplexity") == pytest.approx(perplexity(load_model(desk.model), desk.heldout, windows), rel=1e-5)
    expected = {"model": str(desk.model), "data": str(desk.heldout), "length": LENGTH, "windows": windows or 5}
    assert result == expected
    assert_plain(stderr)


def test_evaluate_reads_json_lines_and_prints_a_sentence(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [json.dumps({"body": line}) for line in desk.heldout.read_text().splitlines()]
    data = desk.folder / "heldout.jsonl"
    data.write_text("\n".join(rows))
    assert main(["evaluate", str(desk.model), "--data", str(data), "--column", "body", "--length", str(LENGTH)]) == 0
    expected = perplexity(load_model(desk.model), desk.heldout)
    assert capsys.readouterr().out == f"perplexity {expected:.4f}  (5 windows of {LENGTH} tokens of {data})\n"


def put_a_nan(desk: Desk) -> None:
    tensors = load_file(desk.model / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][0, 0] = math.nan
    save_file(tensors, desk.model / "model.safetensors", metadata={"format": "pt"})


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


@pytest.mark.parametrize("verb", ["score", "evaluate"])
def test_a_model_with_not_a_number_in_it_gives_no_broken_json(verb: str, desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    put_a_nan(desk)
    code = main(["score", desk.write(), "--json"] if verb == "score" else evaluate(desk, "--json"))
    stdout, stderr = capsys.readouterr()
    if stdout:
        json.loads(stdout, parse_constant=refuse_constant)
    assert code == 2 and "nan" in stderr.lower()


def test_a_model_with_not_a_number_in_it_is_not_published(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    put_a_nan(desk)
    assert main(["compress", desk.write(method="mi")]) == 2
    assert "nan" in capsys.readouterr().err.lower()
    assert not desk.out.exists()


# --- the process ---


def run(*command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    options = {"capture_output": True, "text": True, "timeout": 120, "check": False}
    return subprocess.run([sys.executable, *command], cwd=folder, env=environment, **options)


def test_a_process_of_its_own_with_relative_paths_and_without_ray(desk: Desk) -> None:
    text = desk.recipe()["calibration"] | {"data": "calibration.txt"}
    desk.write(calibration=text, model={"source": "model"}, output={"uri": "out", "name": "demo"})
    done = run("-X", "importtime", "-m", "fusegpt_ray.cli", "score", "recipe.yaml", "--json", folder=desk.folder)
    assert done.returncode == 0 and done.stdout.count("\n") == 1, done.stderr
    scores = [row["score"] for row in json.loads(done.stdout)["blocks"]]
    assert scores == pytest.approx(macro_influence(load_model(desk.model), windows_of(desk, 4)), rel=1e-4)
    imports, said = [], []
    for line in done.stderr.splitlines():
        (imports if line.startswith("import time:") else said).append(line)
    assert said == ["starting the local engine", "tokenising", "scoring 5 blocks on 4 windows"]
    modules = {line.rpartition("|")[2].strip() for line in imports}
    assert "torch" in modules and not {"ray", "datasets", "s3fs"} & modules


def test_no_library_talks_beside_us(desk: Desk) -> None:
    """A local dataset, which `datasets` would prepare under a progress bar of its own."""
    (desk.folder / "texts").mkdir()
    (desk.folder / "texts/test.jsonl").write_text(json.dumps({"text": desk.heldout.read_text()}))
    command = ["evaluate", "model", "--data", "texts", "--length", str(LENGTH), "--json"]
    done = run("-m", "fusegpt_ray.cli", *command, folder=desk.folder)
    assert done.returncode == 0 and done.stdout.count("\n") == 1, done.stderr
    assert json.loads(done.stdout)["perplexity"] == pytest.approx(perplexity(load_model(desk.model), desk.heldout), rel=1e-5)
    assert_plain(done.stderr)
    assert done.stderr.splitlines() == ["starting the local engine", "tokenising", f"evaluating 5 windows of {LENGTH} tokens"]


LIGHT = """
import sys
from fusegpt_ray.cli import main
heavy = {"torch", "transformers", "ray", "deepspeed", "datasets", "s3fs", "numpy"}
verbs = ("compress", "score", "evaluate", "pull", "verify", "clean", "status")
for command in (["--help"], *([verb, "--help"] for verb in verbs), ["compress", "no.yaml"], ["pull", "no", "where"], ["status", "no"]):
    try:
        code = main(command)
    except SystemExit as stop:
        code = stop.code
    print("exit", code, *heavy & set(sys.modules))
"""


def test_help_and_a_wrong_recipe_need_no_heavy_imports(tmp_path: Path) -> None:
    done = run("-c", LIGHT, folder=tmp_path)
    assert re.findall(r"^exit.*", done.stdout, re.MULTILINE) == ["exit 0"] * 8 + ["exit 2"] * 3, done
    for word in (
        "compress",
        "score",
        "evaluate",
        "pull",
        "verify",
        "clean",
        "status",
        "RECIPE",
        "--set",
        "--json",
        "--data",
        "--length",
    ):
        assert word in done.stdout


def test_the_installed_command_is_this_one() -> None:
    (command,) = entry_points(group="console_scripts", name="fusegpt")
    assert command.load() is main


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "COMMAND"),
        (["scor"], "'scor'"),
        (["compress"], "RECIPE"),
        (["compress", "recipe.yaml", "--json"], "--json"),
        (["evaluate", "model", "--length", "8"], "--data"),
        (["pull", "s3://bucket/model"], "DIR"),
        (["clean", "out", "--age", "soon"], "'soon'"),
        (["evaluate", "model", "--data", "text.txt", "--length", "eight"], "'eight'"),
        (["evaluate", "model", "--data", "text.txt", "--length", "8", "--engine", "spark"], "'spark'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_command_line_exits_2(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    stdout, stderr = capsys.readouterr()
    assert (stop.value.code, stdout) == (2, "")
    assert named in stderr.splitlines()[-1]
