"""The benchmark for a GPU, rehearsed on a CPU: all of its parts run, whatever happens in one of
them. What it measures is not tested.
"""

from __future__ import annotations

import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu
import gpu_lab
import gpu_parts
import pytest
import torch

from fusegpt_ray.model.compiled import block_function
from fusegpt_ray.model.runner import Runner

WHOLE, PLAIN = "fine-tune", "fine-tune, the paper's loop in plain torch"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.json"


def measured(out: Path, *options: str, status: int = 0) -> dict[str, Any]:
    """What a run of the toy shape wrote."""
    assert gpu.main(["--shape", "toy", "--json", str(out), *options]) == status
    row: dict[str, Any] = json.loads(out.read_text())["shapes"]["toy"]
    return row


def test_one_device_with_random_weights(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = measured(out)
    assert "| toy |" in capsys.readouterr().out
    assert {"device", "versions"} <= set(json.loads(out.read_text()))
    assert row["hours"] > 0
    assert row["fine-tune"]["loss"] > 0
    assert set(gpu_parts.PARTS) <= set(row)
    assert all(row[part]["seconds"] > row[part]["least"] > 0 for part in gpu_parts.PARTS)


def test_hours_are_those_of_all_rounds() -> None:
    tuning = {"build": 2.0, "tokens": 20 * 1024 * 2048 / 5.0}
    row = {"score": {"scaled": 36.0}, "states": {"scaled": 10.0}, WHOLE: tuning}
    # Two of eight blocks: scored with 8 and with 7 left (36 and 28 of 36 parts of a walk), 17 s a
    # group.
    expected = pytest.approx((36 + 28 + 2 * 17) / 3600)
    toy = gpu.SHAPES["toy"]
    assert gpu.hours(toy, row) == expected
    frugal = row | {WHOLE: {"too large": "no memory"}, gpu_lab.FRUGAL: tuning}
    assert gpu.hours(toy, frugal) == expected, "a group that fits with single windows only"
    assert gpu.hours(toy, row | {"states": {"failed": "a mistake"}}) is None


@pytest.mark.parametrize(
    ("error", "kind", "status"),
    [(RuntimeError("a mis|take"), "failed", 1), (torch.OutOfMemoryError("much"), "too large", 0)],
    ids=["failed", "too large"],
)
def test_a_part_that_fails_leaves_the_others(
    error: Exception,
    kind: str,
    status: int,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    reloaded: list[Runner] = []
    monkeypatch.setattr(Runner, "reload", lambda runner: reloaded.append(runner))
    held: list[weakref.ref[torch.Tensor]] = []

    def fails(lab: gpu_lab.Lab) -> dict[str, Any]:
        large = torch.zeros(10)
        held.append(weakref.ref(large))
        raise type(error)(*error.args)  # whose frames nobody else holds

    def looks(lab: gpu_lab.Lab) -> dict[str, Any]:
        assert reloaded == [lab.runner] * 2, "what the last part moved away is brought back"
        assert held[0]() is None, "nothing of the last part is held"
        return lab.part(1.0, 0.0, 1.0, 1.0, 1.0)

    monkeypatch.setitem(gpu.PARTS, "score", gpu_parts.Measured(fails))
    monkeypatch.setitem(gpu.PARTS, "states", gpu_parts.Measured(looks))
    row = measured(out, "--only", "score", "states", status=status)
    assert set(row["score"]) == {kind} and str(error) in row["score"][kind]
    assert row["states"]["seconds"] == 1.0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| s")]
    assert [line.count("|") for line in lines] == [8, 8], "a table all the same"


def test_a_model_that_cannot_be_opened_leaves_the_next(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> float:
        raise torch.OutOfMemoryError("much")

    monkeypatch.setattr(gpu_lab, "copy_rate", fails)
    monkeypatch.setitem(gpu.SIZES, "llama2-7b", gpu.SIZES["toy"])
    shapes = ["--shape", "toy", "llama2-7b"]
    assert gpu.main([*shapes, "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["shapes"]
    assert all("much" in rows[shape]["opening"]["too large"] for shape in shapes[1:])


def test_whoever_ends_it_leaves_what_was_measured(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ended(lab: gpu_lab.Lab) -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setitem(gpu.PARTS, "score", gpu_parts.Measured(ended))
    with pytest.raises(KeyboardInterrupt):
        measured(out, "--only", "states", "score")
    row = json.loads(out.read_text())["shapes"]["toy"]
    assert row["states"]["seconds"] > 0
    assert "score" not in row


def test_no_part_begins_when_time_is_over(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--shape", "toy", "--minutes", "0", "--json", str(out)]) == 0
    assert "toy: no time left" in capsys.readouterr().out


def test_nothing_of_a_shape_is_held_while_the_next_is_measured(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[weakref.ref[Runner]] = []
    held: list[int] = []
    real = gpu_lab.Lab.open

    def opening(*given: Any) -> gpu_lab.Lab:
        held.append(sum(runner() is not None for runner in opened))
        lab = real(*given)
        opened.append(weakref.ref(lab.runner))
        return lab

    monkeypatch.setattr(gpu_lab.Lab, "open", opening)
    options = ["--only", "score", "states", "--json", str(out)]
    assert gpu.main(["--shape", "toy", "toy", *options]) == 0
    assert held == [0, 0]


def test_the_paper_s_loop_runs_with_whichever_kernels_torch_takes(
    monkeypatch: pytest.MonkeyPatch, out: Path
) -> None:
    """Which kernels a GPU would take is a setting of the process, with or without a GPU."""

    def kernels(lab: gpu_lab.Lab) -> dict[str, Any]:
        strict = torch.are_deterministic_algorithms_enabled()
        return lab.part(1.0, float(strict), 1.0, 1.0, 1.0)

    for name, part in gpu_parts.PARTS.items():
        monkeypatch.setitem(gpu.PARTS, name, replace(part, work=kernels))
    real = gpu_parts.deterministic_kernels
    as_on_a_gpu = torch.device("cuda")
    monkeypatch.setattr(
        gpu_parts, "deterministic_kernels", lambda _, wanted: real(as_on_a_gpu, wanted)
    )
    row = measured(out)
    strict = {name for name in gpu_parts.PARTS if row[name]["gb"]}
    assert {name for name in gpu_parts.PARTS if "paper" in name or "not det" in name} == (
        set(gpu_parts.PARTS) - strict
    )
    assert not torch.are_deterministic_algorithms_enabled()


def test_what_has_moved_away_is_not_computed_with(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU `offload` moves nothing. Here weights that it would move are gone until `reload`."""
    away: dict[torch.Tensor, torch.Tensor] = {}

    def offload(runner: Runner) -> None:
        modules = [runner.trunk.model, *runner.weights._kept.values()]
        assert len(modules) > 1, "weights are kept"
        for module in modules:
            for weight in module.parameters():
                away.setdefault(weight, weight.data)
                weight.data = weight.new_empty(0)

    def reload(runner: Runner) -> None:
        for weight, data in away.items():
            weight.data = data
        away.clear()

    monkeypatch.setattr(Runner, "offload", offload)
    monkeypatch.setattr(Runner, "reload", reload)
    row = measured(out, "--only", WHOLE, PLAIN, "score")
    assert row[WHOLE]["loss"] > 0 and row[PLAIN]["seconds"] > 0 and row["score"]["seconds"] > 0
    assert not away, "brought back for the part that needs them"


@pytest.mark.timeout(600)
def test_blocks_are_compiled_on_a_cpu_if_wanted(out: Path) -> None:
    """Forwards alone, there and back, and once more to compute activations again."""
    block_function.cache_clear()
    row = measured(out, "--compile", "--only", "states", WHOLE, gpu_lab.FRUGAL)
    assert row["blocks"] == "blocks are compiled"
    assert row[gpu_lab.FRUGAL]["loss"] == pytest.approx(row[WHOLE]["loss"], rel=1e-3)
