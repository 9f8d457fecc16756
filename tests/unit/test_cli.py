"""The `fusegpt` command on a tiny model: what it prints, what it exits with, and whether its
numbers are true.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from desk import LENGTH, Desk
from expected import assert_plain, macro_influence, perplexity, windows_of
from models import DEPTH, load_model, without_blocks
from safetensors.torch import load_file, save_file

from fusegpt_ray.cli import main

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
def finished(
    checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Finished:
    """A run that publishes two models on its way, evaluated, in small shards."""
    desk = Desk.make(tmp_path_factory.mktemp("compress"), checkpoint("llama"))
    recipe = desk.write(sparsity=[0.4, 0.2], evaluation={"held-out": {"data": str(desk.heldout)}})
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        assert (
            main(
                [
                    "compress",
                    recipe,
                    "--set",
                    "output.shard_gb=0.00004",
                    "--set",
                    "fusion.learning_rate=0.01",
                ]
            )
            == 0
        )
    return Finished(desk, stdout.getvalue(), stderr.getvalue())


def test_compress_leaves_finished_models_and_nothing_else(finished: Finished) -> None:
    assert sorted(path.name for path in finished.desk.out.iterdir()) == [
        "demo-p20",
        "demo-p40",
    ]  # the run's own folder is gone
    for percent, depth in ((20, DEPTH - 1), (40, DEPTH - 2)):
        assert load_model(finished.folder(percent)).config.num_hidden_layers == depth
        assert len(list(finished.folder(percent).glob("model-*.safetensors"))) > 1
        assert (finished.folder(percent) / "tokenizer.json").exists()


def test_quiet_json_is_all_that_is_said(
    checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    desk = Desk.make(tmp_path, checkpoint("llama"))
    recipe = desk.write(method="mi", evaluation={"held-out": {"data": str(desk.heldout)}})
    assert main(["compress", recipe, "--quiet", "--json"]) == 0
    stdout, stderr = capsys.readouterr()
    manifest = json.loads(next(desk.out.glob("*/fusegpt.json")).read_text())
    (told,) = json.loads(stdout)["models"]
    assert told["perplexity"] == manifest["perplexity"] and set(told["perplexity"]) == {"held-out"}
    assert (Path(told["uri"]) / "fusegpt.json").exists() and stderr == ""


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
    again = dict(
        zip(
            finished.manifest(20)["kept"],
            macro_influence(once, windows_of(finished.desk, 4)),
            strict=True,
        )
    )
    check_scores(manifest["rounds"][1], again)
    assert manifest["removed"][1] == min(again, key=again.__getitem__)


def check_scores(record: dict[str, Any], expected: dict[int, float]) -> None:
    """Each block is scored, or was stopped when it was above the lowest and not yet above its
    score.
    """
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
        "dropped": perplexity(
            without_blocks(dense, "llama", manifest["kept"]), finished.desk.heldout
        ),
        "fused": perplexity(load_model(finished.folder(percent)), finished.desk.heldout),
    }
    found = manifest["perplexity"]["held-out"]
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-4)
    assert abs(expected["fused"] - expected["dropped"]) > 0.01, "or nothing was trained"
    card = (finished.folder(percent) / "README.md").read_text()
    assert " | ".join(f"{expected[key]:.2f}" for key in ("dense", "dropped", "fused")) in card


def test_compress_talks_on_stderr_in_plain_lines(finished: Finished) -> None:
    assert finished.stdout == ""
    assert_plain(finished.stderr)
    lines = finished.stderr.splitlines()
    assert lines[0] == f"{finished.desk.model}: 5 blocks, 2 to remove (fusegpt)"
    assert [
        line.partition(":")[0] for line in lines if line.startswith("round ") and "scoring" in line
    ] == ["round 1/2", "round 2/2"]
    assert [line for line in lines if line.startswith("published ")] == [
        f"published {finished.folder(p)}" for p in (20, 40)
    ]
    for number, record in enumerate(finished.manifest(40)["rounds"], 1):
        assert any(line.startswith(f"round {number}: fusing blocks") for line in lines)
        assert f"  epoch 2/2  loss {record['loss_last']:.4g}" in lines
        read = any(record[key] for key in ("bytes_read", "states_bytes_read"))
        assert read == (number > 1), "the dense blocks were read before, and stay"
    assert not any(line.startswith("  weights read ") for line in lines)
    assert len(lines) < 40


def test_how_often_streamed_weights_were_read_is_told_each_round(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compress", desk.write(), "--set", "cluster.weights=streamed"]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "weights read" in line]
    told = re.compile(r"  weights read [1-4](\.\d+)? times to score, [\d.]+ for states")
    assert len(lines) == 2 and all(map(told.fullmatch, lines)), lines


def test_the_last_table_tells_the_models_apart(finished: Finished) -> None:
    for percent in (20, 40):
        row = finished.manifest(percent)["perplexity"]["held-out"]
        numbers = [f"{row[key]:.2f}" for key in ("dense", "dropped", "fused")]
        (line,) = [
            line
            for line in finished.stderr.splitlines()
            if all(number in line for number in numbers)
        ]
        assert f"demo-p{percent}" in line


# --- score ---


def test_score_prints_one_json_object_with_true_scores(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["score", desk.write(), "--json"]) == 0
    stdout, stderr = capsys.readouterr()
    result = json.loads(stdout)
    protocol = {"data", "windows", "length", "bos", "text_tokens", "times_seen"}
    assert set(result) == {"metric", "blocks", "lowest", *protocol} and stdout.count("\n") == 1
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
def test_score_prints_the_full_table(
    racing: float | None, desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["score", desk.write(importance={"windows": 4, "batch": 1, "racing": racing})]) == 0
    table = capsys.readouterr().out
    scores = macro_influence(load_model(desk.model), windows_of(desk, 4))
    rows = {
        int(block): float(score) for block, score in re.findall(r"│ *(\d+) *│ *([\d.]+)", table)
    }
    assert rows == pytest.approx(dict(enumerate(scores)), rel=1e-4, abs=1e-6)
    (marked,) = re.findall(r"│ *(\d+) .*← lowest", table)
    assert int(marked) == scores.index(min(scores))


# --- evaluate ---


def evaluate(desk: Desk, *arguments: str) -> list[str]:
    return [
        "evaluate",
        str(desk.model),
        "--data",
        str(desk.heldout),
        "--length",
        str(LENGTH),
        *arguments,
    ]


@pytest.mark.parametrize("windows", [None, 2])
def test_evaluate_gives_the_perplexity(
    windows: int | None, desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    limit = [] if windows is None else ["--windows", str(windows)]
    assert main(evaluate(desk, "--json", *limit)) == 0
    stdout, stderr = capsys.readouterr()
    result = json.loads(stdout)
    assert stdout.count("\n") == 1
    assert result.pop("perplexity") == pytest.approx(
        perplexity(load_model(desk.model), desk.heldout, windows), rel=1e-5
    )
    protocol = {"data": str(desk.heldout), "windows": windows or 5, "length": LENGTH, "bos": False}
    expected = {"model": str(desk.model), **protocol}
    assert result.items() >= expected.items()
    assert_plain(stderr)


def test_evaluate_reads_json_lines_and_prints_a_sentence(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.dumps({"body": line}) for line in desk.heldout.read_text().splitlines()]
    data = desk.folder / "heldout.jsonl"
    data.write_text("\n".join(rows))
    assert (
        main(
            [
                "evaluate",
                str(desk.model),
                "--data",
                str(data),
                "--column",
                "body",
                "--length",
                str(LENGTH),
            ]
        )
        == 0
    )
    expected = perplexity(load_model(desk.model), desk.heldout)
    protocol = f"5 windows of {LENGTH} tokens of {data}, without a beginning-of-sequence token"
    said = re.fullmatch(r"perplexity (\d+\.\d{4})  \((.+)\)\n", capsys.readouterr().out)
    assert said and said[2] == protocol
    assert float(said[1]) == pytest.approx(expected, rel=1e-5)  # batches of another size


def put_a_nan(desk: Desk) -> None:
    tensors = load_file(desk.model / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][0, 0] = math.nan
    save_file(tensors, desk.model / "model.safetensors", metadata={"format": "pt"})


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


@pytest.mark.parametrize("verb", ["score", "evaluate"])
def test_a_model_with_not_a_number_in_it_gives_no_broken_json(
    verb: str, desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    put_a_nan(desk)
    code = main(["score", desk.write(), "--json"] if verb == "score" else evaluate(desk, "--json"))
    stdout, stderr = capsys.readouterr()
    if stdout:
        json.loads(stdout, parse_constant=refuse_constant)
    assert code == 2 and "nan" in stderr.lower()


def test_a_model_with_not_a_number_in_it_is_not_published(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    put_a_nan(desk)
    assert main(["compress", desk.write(method="mi")]) == 2
    assert "nan" in capsys.readouterr().err.lower()
    assert not desk.out.exists()
