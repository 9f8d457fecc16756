"""The states that a round is trained on, against the real model."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from watching import Watch
from workshop import CLOSE, CPU, IDS, Workshop, _workshop, settings  # noqa: F401 - fixtures

from fusegpt_ray.fusion.group_fusion import GroupFusion
from fusegpt_ray.model import weights
from fusegpt_ray.model.runner import Runner
from fusegpt_ray.model.stack import Block, Stack


def bare_stack(kept: Sequence[int]) -> Stack:
    return Stack({}, "", {}, tuple(Block(i, {}) for i in kept))


def but(*missing: int) -> list[int]:
    return [i for i in range(12) if i not in missing]


@pytest.mark.parametrize(
    ("kept", "donor", "group", "current", "dense"),
    [
        # Twelve blocks, three neighbours: the group is p − 2 … p + 1. `dense`: where the next block
        # left stood, or the end.
        pytest.param(but(), 5, [3, 4, 5, 6], 7, 7, id="nothing missing"),
        pytest.param(but(2), 6, [4, 5, 6, 7], 7, 8, id="missing before the group"),
        pytest.param(but(5), 6, [3, 4, 6, 7], 7, 8, id="missing in the group"),
        pytest.param(but(7, 8), 5, [3, 4, 5, 6], 7, 9, id="missing right after the group"),
        pytest.param(but(10), 5, [3, 4, 5, 6], 7, 7, id="missing farther on"),
        pytest.param(but(1, 5, 8), 6, [3, 4, 6, 7], 6, 9, id="missing everywhere"),
        pytest.param(but(), 11, [8, 9, 10, 11], 12, 12, id="last block"),
        pytest.param(but(11), 10, [7, 8, 9, 10], 11, 12, id="the last block is missing"),
        pytest.param(but(), 0, [0, 1, 2, 3], 4, 4, id="first block"),
        pytest.param(but(0), 1, [1, 2, 3, 4], 4, 5, id="the first block is missing"),
        pytest.param([4, 9], 9, [4, 9], 2, 12, id="fewer blocks than a group"),
    ],
)
def test_teachers(kept: list[int], donor: int, group: list[int], current: int, dense: int) -> None:
    for preset, expected in (("paper", current), ("rounds", dense)):
        job = GroupFusion(
            bare_stack(kept), bare_stack(range(12)), donor, settings(preset), True, 0, ""
        )
        model, position = job.source.teacher, job.source.stop
        assert [block.dense for block in job.group] == group
        assert [block.dense for block in job.neighbours] == [i for i in group if i != donor]
        assert (model.kept, position) == (tuple(kept if preset == "paper" else range(12)), expected)


@pytest.mark.parametrize("workshop", ["llama", "gemma3", "gpt2"], indirect=True)
@pytest.mark.parametrize(
    ("missing", "donor", "start", "current", "dense"),
    [
        # Five blocks, two neighbours: the group is p − 1 … p + 1.
        pytest.param(None, 2, 1, 4, 4, id="nothing missing"),
        pytest.param(1, 3, 1, 4, 5, id="missing before the group"),
        pytest.param(2, 1, 0, 3, 4, id="missing in the group"),
        pytest.param(3, 1, 0, 3, 4, id="missing after the group"),
        pytest.param(0, 1, 0, 3, 4, id="the first block is missing"),
        pytest.param(0, 3, 1, 4, 5, id="other blocks before the group than in the dense model"),
    ],
)
def test_states_are_those_of_the_real_model(
    workshop: Workshop, missing: int | None, donor: int, start: int, current: int, dense: int
) -> None:
    stack = workshop.dense if missing is None else workshop.dense.drop(missing)
    real_now, real_dense = workshop.real_states(stack), workshop.real_states(workshop.dense)
    for teacher_name, expected in (("current", real_now[current]), ("dense", real_dense[dense])):
        entering, leaving = workshop.states(
            workshop.job(donor, stack, group_size=2, teacher=teacher_name)
        )
        torch.testing.assert_close(entering, real_now[start], **CLOSE)
        torch.testing.assert_close(leaving, expected, **CLOSE)


@pytest.mark.parametrize(
    ("missing", "donor", "reads"),
    [
        pytest.param(None, 2, 4, id="nothing missing"),
        pytest.param(3, 1, 4, id="missing after the group"),
        pytest.param(0, 3, 1 + 5, id="missing before the group: two walks"),
    ],
)
def test_one_walk_where_student_and_teacher_lie_on_the_same_blocks(
    workshop: Workshop, missing: int | None, donor: int, reads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch()
    monkeypatch.setattr(weights, "read_tensors", watch)
    stack = workshop.dense if missing is None else workshop.dense.drop(missing)
    job = workshop.job(donor, stack, group_size=2, teacher="dense")
    job.source.walk(Runner(workshop.dense, CPU, torch.float32, batch_size=8), IDS[:2])
    assert len(watch.alive) == reads
