"""The losses, each against its formula written out."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.spawn import spawn
from torch.nn import functional as F
from workers import split_loss

from fusegpt_ray.training.losses import LOSSES, batch_kl, normalized_mse

B, T, D = 4, 3, 5
WORKERS = 2


def plain_batch_kl(student_BTD: torch.Tensor, teacher_BTD: torch.Tensor) -> torch.Tensor:
    """P = softmax over the batch of the teacher's states, Q of the student's; KL(P‖Q),
    batchmean."""
    return F.kl_div(
        F.log_softmax(student_BTD, dim=0), F.softmax(teacher_BTD, dim=0), reduction="batchmean"
    )


def random_states(scale: float = 2.0, batch: int = B) -> tuple[torch.Tensor, torch.Tensor]:
    teacher = scale * torch.randn(batch, T, D)
    return (teacher + 0.5 * scale * torch.randn(batch, T, D)).requires_grad_(), teacher


# Float32 sums of 60 terms of order 1.
LOSS_CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0, 1000.0])
def test_batch_kl_is_the_plain_definition(scale: float) -> None:
    student, teacher = random_states(scale)
    student_64 = student.detach().double().requires_grad_()
    loss, expected = batch_kl(student, teacher, False), plain_batch_kl(student_64, teacher.double())
    loss.backward()
    expected.backward()
    # Differences of states this large are known to 1e-7 of the states.
    close = {"rtol": 1e-4, "atol": 1e-6 * max(1.0, scale)}
    torch.testing.assert_close(loss.double(), expected, **close)
    torch.testing.assert_close(student.grad.double(), student_64.grad, **close)


def test_batch_kl_by_hand() -> None:
    # Teacher: 3/4 and 1/4 of the batch's mass; student: one half each. Sum over one token and
    # one number, over a batch of 2.
    teacher = torch.tensor([3.0, 1.0]).log().view(2, 1, 1)
    student = torch.zeros(2, 1, 1)
    expected = (0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)) / 2
    assert batch_kl(student, teacher, False).item() == pytest.approx(expected, rel=1e-6)


def test_batch_kl_sees_no_shift_common_to_the_batch() -> None:
    student, teacher = random_states()
    shift_TD = 3 * torch.randn(T, D)
    loss = batch_kl(student, teacher, False)
    torch.testing.assert_close(batch_kl(student + shift_TD, teacher, False), loss, **LOSS_CLOSE)
    torch.testing.assert_close(batch_kl(student, teacher + shift_TD, False), loss, **LOSS_CLOSE)
    assert batch_kl(teacher + shift_TD, teacher, False).abs() < 1e-6
    assert loss > 0.1


def test_batch_kl_of_a_single_row_teaches_nothing() -> None:
    """Why a loss batch must not be split into rows without sharing the normaliser."""
    student, teacher = random_states(batch=1)
    loss = batch_kl(student, teacher, False)
    loss.backward()
    assert loss == 0
    assert not student.grad.any()


def test_batch_kl_of_small_states_is_half_the_centred_squared_error() -> None:
    student, teacher = random_states(1e-2)
    error = (student - teacher).detach()
    expected = (
        0.5 * (error - error.mean(0)).pow(2).sum() / B**2
    )  # P is about 1 / B everywhere; batchmean divides by B again
    # Relative: the next term of the series is of the order of the states, 1e-2. Absolute:
    # float32 sums of logarithms.
    torch.testing.assert_close(
        batch_kl(student, teacher, False).detach(), expected, rtol=0.03, atol=1e-6
    )


def test_normalized_mse_is_its_definition() -> None:
    student, teacher = random_states()
    a, b = student.detach().double(), teacher.double()
    a = a / (a.pow(2).mean(-1, keepdim=True)).sqrt()
    b = b / (b.pow(2).mean(-1, keepdim=True)).sqrt()
    expected = ((a - b) ** 2).sum() / (B * T * D)
    # The definition in use adds 1e-6 to mean squares of about 4.
    torch.testing.assert_close(
        normalized_mse(student, teacher, False).double(), expected, **LOSS_CLOSE
    )
    scaled = normalized_mse(
        7 * student, 0.5 * teacher, False
    )  # lengths are what the next norm takes away
    torch.testing.assert_close(scaled.double(), expected, **LOSS_CLOSE)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_zero_for_the_teacher_itself_and_finite_in_bfloat16(name: str) -> None:
    student, teacher = random_states(300.0)
    assert LOSSES[name](teacher, teacher, False) == 0
    low = LOSSES[name](student.bfloat16(), teacher.bfloat16(), False)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, LOSSES[name](student, teacher, False), rtol=0.05, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_teach_the_student_only(name: str) -> None:
    student, teacher = random_states()
    teacher.requires_grad_()
    LOSSES[name](student, teacher.detach(), False).backward()
    assert student.grad.any()


def test_a_loss_batch_split_over_workers_has_the_gradient_of_the_whole(tmp_path: Path) -> None:
    data = {"x": torch.randn(B, T, D), "weight": torch.randn(D, D), "teacher": torch.randn(B, T, D)}
    torch.save(data, tmp_path / "data.pt")
    spawn(split_loss, (WORKERS, str(tmp_path)), nprocs=WORKERS)
    parts = [torch.load(tmp_path / f"out{rank}.pt") for rank in range(WORKERS)]
    weight = data["weight"].requires_grad_()
    for name, plain in (
        ("batch_kl", plain_batch_kl),
        ("normalized_mse", lambda s, t: normalized_mse(s, t, False)),
    ):
        expected = plain(data["x"] @ weight, data["teacher"])
        (gradient,) = torch.autograd.grad(expected, weight)
        torch.testing.assert_close(
            sum(part[name][0] for part in parts) / WORKERS, expected.detach(), **LOSS_CLOSE
        )
        for part in parts:
            torch.testing.assert_close(part[name][1], gradient, **LOSS_CLOSE)
