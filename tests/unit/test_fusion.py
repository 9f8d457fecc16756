"""The parts of fusing, each against its formula written out: the group, the fused layer, the losses, the optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.multiprocessing.spawn import spawn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D
from workers import split_loss

from fusegpt_ray.fusion.finetune import Batch, batches_of, cosine_to_zero, make_optimizer, train
from fusegpt_ray.fusion.group import group_span
from fusegpt_ray.fusion.linear import FusedLinear
from fusegpt_ray.fusion.loss import LOSSES, batch_kl, normalized_mse
from fusegpt_ray.sections import PRESETS, Fusion

# --- the partial group ---


@pytest.mark.parametrize(
    ("blocks", "donor", "first", "last"),
    [
        # "for p > 0 blocks p−4 … p+3; clamped to the first 8 or the last 8; p = 0 takes 0…7"
        (32, 0, 0, 7),
        (32, 1, 0, 7),
        (32, 3, 0, 7),
        (32, 4, 0, 7),
        (32, 5, 1, 8),
        (32, 16, 12, 19),
        (32, 27, 23, 30),
        (32, 28, 24, 31),
        (32, 29, 24, 31),
        (32, 31, 24, 31),
        (12, 0, 0, 7),
        (12, 6, 2, 9),
        (12, 8, 4, 11),
        (12, 11, 4, 11),
        (9, 4, 0, 7),
        (9, 5, 1, 8),
        (8, 0, 0, 7),
        (8, 4, 0, 7),
        (8, 7, 0, 7),
        # "Fewer than 8 blocks left: all of them."
        (5, 0, 0, 4),
        (5, 2, 0, 4),
        (5, 4, 0, 4),
        (1, 0, 0, 0),
    ],
)
def test_group_of_seven_neighbours(blocks: int, donor: int, first: int, last: int) -> None:
    assert list(group_span(donor, blocks, 7)) == list(range(first, last + 1))


@pytest.mark.parametrize("neighbours", [1, 2, 3, 6, 7])
@pytest.mark.parametrize("blocks", [1, 2, 5, 8, 13])
def test_any_group_holds_its_donor_and_as_many_neighbours_as_there_are(blocks: int, neighbours: int) -> None:
    for donor in range(blocks):
        span = group_span(donor, blocks, neighbours)
        assert donor in span
        assert len(span) == min(neighbours + 1, blocks)
        assert span.start >= 0
        assert span.stop <= blocks


# --- the fused layer ---

OUT, IN, RANK, LORA = 6, 5, 3, 2
KINDS = {
    "linear": lambda: nn.Linear(IN, OUT),
    "linear without bias": lambda: nn.Linear(IN, OUT, bias=False),
    "Conv1D": lambda: Conv1D(OUT, IN),
}


def make_layer(kind: str, dtype: torch.dtype) -> nn.Module:
    layer = KINDS[kind]().to(dtype).requires_grad_(False)
    for parameter in layer.parameters():
        parameter.normal_()
    return layer


def fuse(
    kind: str, donors: int, dtype: torch.dtype = torch.float64, learned: torch.dtype = torch.float64, seed: int = 0
) -> tuple[FusedLinear, nn.Module, list[nn.Module]]:
    own = make_layer(kind, dtype)
    others = [make_layer(kind, dtype) for _ in range(donors)]
    return FusedLinear(own, others, RANK, LORA, learned, torch.Generator().manual_seed(seed)), own, others


def shake(layer: nn.Module) -> None:
    """Away from the start, where half of what learns is zero."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5)


def formula(own: nn.Module, others: list[nn.Module], p: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """y = x·W'ᵀ + b', W' = W + B·A + Σ (C_k·D_k) ⊙ W_k and b' = b + Σ c_k ⊙ b_k, weights [outputs, inputs]."""
    weight, bias = as_paper(own) + p["B"] @ p["A"], own.bias
    for k, other in enumerate(others):
        weight = weight + (p[f"C{k}"] @ p[f"D{k}"]) * as_paper(other)
        if bias is not None:
            bias = bias + p[f"c{k}"] * other.bias
    y = x @ weight.T
    return y if bias is None else y + bias


def as_paper(layer: nn.Module) -> torch.Tensor:
    """A layer's weight as [outputs, inputs]; Conv1D keeps it the other way round."""
    return layer.weight.T if isinstance(layer, Conv1D) else layer.weight


@pytest.mark.parametrize("donors", [0, 1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_gradients_are_the_formula(kind: str, donors: int) -> None:
    fused, own, others = fuse(kind, donors)
    shake(fused)
    p = {name: value.detach().clone().requires_grad_() for name, value in fused.named_parameters()}
    biases = 0 if own.bias is None else donors
    assert len(p) == 2 + 2 * donors + biases
    x = torch.randn(2, 4, IN, dtype=torch.float64)
    upstream = torch.randn(2, 4, OUT, dtype=torch.float64)
    x_fused, x_formula = x.clone().requires_grad_(), x.clone().requires_grad_()

    y = fused(x_fused)
    expected = formula(own, others, p, x_formula)
    (y * upstream).sum().backward()
    (expected * upstream).sum().backward()

    # float64 throughout: only the order of additions differs.
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(y, expected, **close)
    torch.testing.assert_close(x_fused.grad, x_formula.grad, **close)
    for name, value in fused.named_parameters():
        torch.testing.assert_close(value.grad, p[name].grad, **close)
        assert value.grad.abs().max() > 0.01, name


@pytest.mark.parametrize("kind", KINDS)
def test_folding_equals_forward(kind: str) -> None:
    fused, own, _ = fuse(kind, 2)
    shake(fused)
    x = torch.randn(3, IN, dtype=torch.float64)
    expected = fused(x)
    weight, bias = fused.fused()
    own.load_state_dict({"weight": weight} if bias is None else {"weight": weight, "bias": bias})
    torch.testing.assert_close(own(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("learned", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_starts_as_the_layer_it_replaces(kind: str, dtype: torch.dtype, learned: torch.dtype) -> None:
    fused, own, _ = fuse(kind, 2, dtype, learned)
    x = torch.randn(3, 4, IN, dtype=dtype)
    weight, bias = fused.fused()
    assert torch.equal(weight.to(dtype), own.weight)
    assert bias is None or torch.equal(bias.to(dtype), own.bias)
    if kind == "Conv1D":  # another matrix product than Conv1D's own: the last bits differ
        torch.testing.assert_close(fused(x), own(x))
    else:
        assert torch.equal(fused(x), own(x))


def test_what_learns_starts_as_the_paper_says() -> None:
    own, donor = nn.Linear(100, 40), nn.Linear(100, 40)
    fused = FusedLinear(own, [donor], 64, 32, torch.float32, torch.Generator().manual_seed(0))
    shapes = {name: tuple(value.shape) for name, value in fused.named_parameters()}
    assert shapes == {"A": (32, 100), "B": (40, 32), "C0": (40, 64), "D0": (64, 100), "c0": (40,)}
    for name in ("B", "C0", "c0"):
        assert not getattr(fused, name).any()
    for name in ("A", "D0"):  # Kaiming uniform with a = √5: within ± √(6 / ((1 + a²)·100)) = ± 0.1
        value = getattr(fused, name)
        assert 0.099 < value.abs().max() <= 0.1
        assert value.std().item() == pytest.approx(0.1 / math.sqrt(3), rel=0.03)
        assert abs(value.mean().item()) < 0.003
    assert {name for name, value in fused.named_parameters() if value.requires_grad} == set(shapes)
    assert own.weight.data_ptr() == fused.weight.data_ptr()  # frozen weights are shared, not copied
    assert donor.weight.data_ptr() == fused.donor_weight0.data_ptr()


def test_the_seed_alone_decides_the_start() -> None:
    def start(seed: int) -> torch.Tensor:
        torch.rand(7)  # the global generator has no say
        return fuse("linear", 1, seed=seed)[0].D0.detach()

    assert torch.equal(start(1), start(1))
    assert not torch.equal(start(1), start(2))


@pytest.mark.parametrize("kind", KINDS)
def test_float32_masters_of_bfloat16_weights(kind: str) -> None:
    """The sum is formed in float32 and rounded once; gradients are float32."""
    fused, own, others = fuse(kind, 1, torch.bfloat16, torch.float32)
    shake(fused)
    p = dict(fused.named_parameters())
    exact = as_paper(own).float() + p["B"] @ p["A"] + (p["C0"] @ p["D0"]) * as_paper(others[0]).float()
    bias = None if own.bias is None else (own.bias.float() + p["c0"] * others[0].bias.float()).bfloat16()
    weight = exact.bfloat16()
    x = torch.randn(4, IN)
    y = fused(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, F.linear(x.bfloat16(), weight, bias))
    with torch.autocast("cpu", dtype=torch.bfloat16):  # training runs inside autocast, which must not round the masters
        assert torch.equal(fused.fused()[0], exact.T if kind == "Conv1D" else exact)
        assert torch.equal(fused(x), y)
    y.float().sum().backward()
    assert {value.grad.dtype for value in p.values()} == {torch.float32}


# --- the losses ---

B, T, D = 4, 3, 5
WORKERS = 2


def plain_batch_kl(student_BTD: torch.Tensor, teacher_BTD: torch.Tensor) -> torch.Tensor:
    """P = softmax over the batch of the teacher's states, Q of the student's; KL(P‖Q), batchmean."""
    return F.kl_div(F.log_softmax(student_BTD, dim=0), F.softmax(teacher_BTD, dim=0), reduction="batchmean")


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
    # Teacher: 3/4 and 1/4 of the batch's mass; student: one half each. Sum over one token and one number, over a batch of 2.
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
    expected = 0.5 * (error - error.mean(0)).pow(2).sum() / B**2  # P is about 1 / B everywhere; batchmean divides by B again
    # Relative: the next term of the series is of the order of the states, 1e-2. Absolute: float32 sums of logarithms.
    torch.testing.assert_close(batch_kl(student, teacher, False).detach(), expected, rtol=0.03, atol=1e-6)


def test_normalized_mse_is_its_definition() -> None:
    student, teacher = random_states()
    a, b = student.detach().double(), teacher.double()
    a = a / (a.pow(2).mean(-1, keepdim=True)).sqrt()
    b = b / (b.pow(2).mean(-1, keepdim=True)).sqrt()
    expected = ((a - b) ** 2).sum() / (B * T * D)
    # The definition in use adds 1e-6 to mean squares of about 4.
    torch.testing.assert_close(normalized_mse(student, teacher, False).double(), expected, **LOSS_CLOSE)
    scaled = normalized_mse(7 * student, 0.5 * teacher, False)  # lengths are what the next norm takes away
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
    for name, plain in (("batch_kl", plain_batch_kl), ("normalized_mse", lambda s, t: normalized_mse(s, t, False))):
        expected = plain(data["x"] @ weight, data["teacher"])
        (gradient,) = torch.autograd.grad(expected, weight)
        torch.testing.assert_close(sum(part[name][0] for part in parts) / WORKERS, expected.detach(), **LOSS_CLOSE)
        for part in parts:
            torch.testing.assert_close(part[name][1], gradient, **LOSS_CLOSE)


# --- the optimizer and the loop ---


class Group(nn.Module):
    """What a student looks like to the optimizer."""

    def __init__(self, donors: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(IN)
        self.layer = fuse("linear", donors, torch.float32, torch.float32)[0]
        self.frozen = nn.Linear(IN, IN).requires_grad_(False)


def settings(**values: object) -> Fusion:
    return Fusion(**(PRESETS["paper"] | {"preset": "paper"} | values))


def test_coefficients_have_one_rate_and_the_rest_another() -> None:
    group = Group(donors=2)
    optimizer = make_optimizer(group, settings())
    names = {id(value): name for name, value in group.named_parameters()}
    rates = {names[id(value)]: entry["lr"] for entry in optimizer.param_groups for value in entry["params"]}
    fast = ["C0", "D0", "c0", "C1", "D1", "c1"]
    slow = ["norm.weight", "norm.bias", "layer.A", "layer.B"]
    assert rates == {f"layer.{name}": 1e-3 for name in fast} | dict.fromkeys(slow, 9.65e-6)
    assert type(optimizer) is torch.optim.Adam
    for entry in optimizer.param_groups:
        assert (entry["betas"], entry["eps"], entry["weight_decay"], entry["amsgrad"]) == ((0.9, 0.95), 1e-8, 0, False)


def test_without_a_donor_there_is_only_the_second_rate() -> None:
    optimizer = make_optimizer(Group(donors=0), settings(lora_learning_rate=0.25))
    assert [entry["lr"] for entry in optimizer.param_groups] == [0.25]


def test_both_rates_follow_the_cosine_to_zero() -> None:
    optimizer = make_optimizer(Group(donors=1), settings(learning_rate=1.0, lora_learning_rate=0.5))
    schedule = cosine_to_zero(optimizer, 4)
    seen = []
    for _ in range(6):
        seen.append([entry["lr"] for entry in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    shares = [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0, 0]  # ½ (1 + cos(π·step / 4)), then 0
    for rates, share in zip(seen, shares, strict=True):
        assert rates == pytest.approx([share, 0.5 * share], abs=1e-12)


def test_batches_are_consecutive_and_whole() -> None:
    entering, leaving = torch.arange(6.0), torch.arange(6.0) * 10
    pairs = [(x.tolist(), y.tolist()) for x, y in batches_of(entering, leaving, 2)]
    assert pairs == [([0, 1], [0, 10]), ([2, 3], [20, 30]), ([4, 5], [40, 50])]
    with pytest.raises(AssertionError):
        batches_of(entering, leaving, 4)


class Recorder:
    """A stepper that only writes down what it is given; its loss is the first number of the batch."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def step(self, batch: Batch) -> torch.Tensor:
        self.seen.append(batch[0][0].item())
        return batch[0][0]

    def mean(self, losses: torch.Tensor) -> float:
        return losses.mean().item()


def an_epoch(values: list[float]) -> Callable[[], Iterator[Batch]]:
    return lambda: iter([(torch.tensor([value]), torch.tensor([value])) for value in values])


def test_every_epoch_sees_the_same_batches_in_the_same_order() -> None:
    recorder, reported = Recorder(), []
    means = train(recorder, an_epoch([1.0, 2.0, 6.0]), 3, lambda number, mean: reported.append((number, mean)))
    assert recorder.seen == [1, 2, 6] * 3
    assert means == [3.0] * 3
    assert reported == [(1, 3.0), (2, 3.0), (3, 3.0)]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_training(value: float) -> None:
    reported: list[int] = []
    with pytest.raises(FloatingPointError, match=r"fusion\.learning_rate"):
        train(Recorder(), an_epoch([1.0, value]), 3, lambda number, _: reported.append(number))
    assert reported == []
