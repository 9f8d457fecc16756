"""When memory runs out, work begins again with fewer windows at a time and ends with the same
result; the limit here is a real one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cramped import LIMITS, MB, SCORED, TRAINED, save_broad, save_wide, tune_many, work
from safetensors.torch import load_file
from torch.multiprocessing.spawn import ProcessRaisedException, spawn

from fusegpt_ray.compressing.rounds import fewer_at_once
from fusegpt_ray.model.memory import find_batch_size, is_out_of_memory
from fusegpt_ray.recipe.recipe import Recipe


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_wide(tmp_path_factory.mktemp("wide"))


@pytest.fixture
def run(wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.setenv(
        "MALLOC_MMAP_THRESHOLD_", "65536"
    )  # every large tensor goes back to the system when it is freed

    def run(what: str, more: int | None, loss: str = "normalized_mse") -> Any:
        out = tmp_path / f"{what}-{more}"
        spawn(work, (wide, out, what, loss, more))
        return torch.load(out, weights_only=False)

    return run


@pytest.mark.parametrize("loss", ["batch_kl", "normalized_mse"])
def test_fine_tuning_that_runs_out_of_memory_goes_on_with_less(
    run: Callable[..., Any], loss: str
) -> None:
    free, cramped = run("finetune", None, loss), run("finetune", LIMITS["finetune"], loss)
    assert (free.micro_batch, cramped.micro_batch) == (TRAINED, TRAINED // 2)
    assert cramped.losses == pytest.approx(free.losses, rel=1e-5)
    pairs = list(zip(sorted(free.saved.files), sorted(cramped.saved.files), strict=True))
    assert len(pairs) == 3
    for one, other in pairs:
        weights, others = load_file(one), load_file(other)
        for name, weight in weights.items():
            # Sums in another order; Adam divides by the gradient's size, so tiny gradients'
            # rounding grows into steps of 1e-3.
            torch.testing.assert_close(
                others[name],
                weight,
                rtol=0,
                atol=1e-5,
                msg=lambda text, name=name: f"{name}: {text}",
            )


def test_scoring_that_runs_out_of_memory_goes_on_with_less(run: Callable[..., Any]) -> None:
    free, cramped = run("score", None), run("score", LIMITS["score"])
    assert (free.batch_size, cramped.batch_size) == (SCORED, SCORED // 2)
    assert cramped.lowest == free.lowest
    assert cramped.estimates == pytest.approx(free.estimates, rel=1e-5)


def test_states_that_do_not_fit_lie_in_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """104 MB of states, 90 MB of memory; not a bit changes, and no file is left."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    folder = save_broad(tmp_path / "broad")
    found = []
    for more in (None, 90 * MB):
        spawn(tune_many, (folder, tmp_path / f"{more}", more))
        found.append(torch.load(tmp_path / f"{more}", weights_only=False))
    free, cramped = found
    assert free.states_batch_size == cramped.states_batch_size
    assert free.micro_batch == cramped.micro_batch
    assert cramped.losses == free.losses
    records = [sorted(record.sha256 for record in tuned.saved.files.values()) for tuned in found]
    assert records[0] == records[1]
    assert not list((tmp_path / "temporary").glob("fusegpt-states-*"))


def test_what_never_fits_says_so(run: Callable[..., Any]) -> None:
    with pytest.raises(
        ProcessRaisedException,
        match=r"MemoryError: fine-tuning the group runs out of memory with a single window",
    ):
        run("finetune", 20 * MB)


def test_what_counts_as_running_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)
    assert type(caught.value) is RuntimeError
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    )
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("the word MemoryError in a user's file"))


@pytest.mark.parametrize(
    ("share", "fits", "tried"), [(8, 2, [8, 4, 2]), (6, 1, [6, 3, 1]), (9, 4, [9, 3]), (7, 7, [7])]
)
def test_attempts_are_with_divisors_of_the_share(share: int, fits: int, tried: list[int]) -> None:
    seen: list[int] = []

    def attempt(rows: int) -> str:
        seen.append(rows)
        if rows > fits:
            raise MemoryError
        return "done"

    assert find_batch_size(attempt, share, share, "work") == ("done", tried[-1])
    assert seen == tried


def test_a_single_window_that_does_not_fit_is_the_end() -> None:
    def attempt(rows: int) -> None:
        raise MemoryError("no room")

    with pytest.raises(MemoryError, match=r"work runs out .* single window .* calibration\.length"):
        find_batch_size(attempt, 8, 8, "work")


def test_other_errors_are_not_tried_again() -> None:
    with pytest.raises(ZeroDivisionError):
        find_batch_size(lambda rows: 1 // (rows - 4), 4, 4, "work")


def test_the_least_that_was_used_is_told() -> None:
    given = {
        "model": {"source": "x"},
        "calibration": {"data": "x"},
        "output": {"uri": "x", "name": "x"},
    }
    recipe = Recipe.parse(given | {"cluster": {"workers": 2}})
    asked = {"batch_size": 4, "states_batch_size": 4, "micro_batch": 4}
    dropped = {"batch_size": 4, "states_batch_size": None, "micro_batch": None}
    assert fewer_at_once(recipe, [asked, dropped]) == ""
    fewer = fewer_at_once(
        recipe, [asked, asked | {"batch_size": 2, "micro_batch": 2}, asked | {"micro_batch": 1}]
    )
    assert fewer == "2 of 4 in scoring, 1 of 4 in fine-tuning"
