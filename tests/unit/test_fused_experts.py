"""Experts are fused and healed one by one, whichever way they are kept on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from experts import EXPERTS, save_merged, save_split
from models import open_stack, token_windows
from safetensors.torch import load_file
from workshop import settings

from fusegpt_ray.fusion.group_fusion import GroupFusion
from fusegpt_ray.fusion.linear import Experts, FusedLinear
from fusegpt_ray.model.architecture import build_meta_blocks
from fusegpt_ray.model.runner import Runner
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.store.checkpoint import read_tensors
from fusegpt_ray.training.loop import train
from fusegpt_ray.training.span import Span
from fusegpt_ray.training.states import States
from fusegpt_ray.training.stepper import TorchStepper, TrainingConfig

CPU = torch.device("cpu")
IDS = token_windows(8, 7)
BATCH, DONOR = 4, 3
E, OUT, IN = 3, 6, 5
Tensors = dict[str, torch.Tensor]


# --- the formula ---


@pytest.mark.parametrize("transposed", [False, True])
def test_an_expert_is_fused_as_a_layer_by_itself(transposed: bool) -> None:
    shape = (E, IN, OUT) if transposed else (E, OUT, IN)
    own, *others = (
        Experts(
            torch.randn(shape, dtype=torch.float64),
            torch.randn(E, OUT, dtype=torch.float64),
            transposed,
        )
        for _ in range(3)
    )
    donors = [(other.weight, other.bias) for other in others]
    fused = FusedLinear(own, donors, 2, 3, torch.float64, torch.Generator().manual_seed(0))
    at_start = fused()
    assert torch.equal(at_start["weight"], own.weight)
    assert torch.equal(at_start["bias"], own.bias)
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.normal_()
    p = dict(fused.named_parameters())
    assert p["A"].shape == (E, 3, IN) and p["C0"].shape == (E, OUT, 2)
    formed, upstream = fused(), torch.randn(shape, dtype=torch.float64)
    (formed["weight"] * upstream).sum().backward()
    for e in range(E):
        q = {name: value.detach()[e].requires_grad_() for name, value in p.items()}

        def laid_out(weight_OI: torch.Tensor) -> torch.Tensor:
            return weight_OI.T if transposed else weight_OI

        weight, bias = own.weight[e] + laid_out(q["B"] @ q["A"]), own.bias[e]
        for k, other in enumerate(others):
            weight = weight + laid_out(q[f"C{k}"] @ q[f"D{k}"]) * other.weight[e]
            bias = bias + q[f"c{k}"] * other.bias[e]
        torch.testing.assert_close(formed["weight"][e], weight)
        torch.testing.assert_close(formed["bias"][e], bias)
        (weight * upstream[e]).sum().backward()
        for name in ("A", "B", "C0", "D0", "C1", "D1"):
            torch.testing.assert_close(p[name].grad[e], q[name].grad)


def test_experts_start_at_random_each_by_itself() -> None:
    own = Experts(torch.randn(E, OUT, IN), None, False)
    fused = FusedLinear(own, [(own.weight, None)], 2, 3, torch.float32, torch.Generator())
    assert len({tuple(row.flatten().tolist()) for row in fused.D0}) == E
    assert fused.A.abs().max() <= 1 / IN**0.5  # Kaiming uniform with a = √5


# --- there and back ---


@pytest.mark.parametrize("layout", [save_split, save_merged])
@pytest.mark.parametrize("name", EXPERTS)
def test_parameters_are_stored_as_the_tensors_they_were_made_of(
    name: str, layout: object, tmp_path: Path
) -> None:
    assert callable(layout)
    dense = open_stack(layout(name, tmp_path))
    model = load_file(tmp_path / "model.safetensors")
    for block, empty in zip(dense.blocks, build_meta_blocks(dense.config), strict=True):
        parameters = empty.read(block.weights)
        shapes = {key: value.shape for key, value in empty.module.named_parameters()}
        assert {key: parameters[key].shape for key in shapes} == shapes
        back = empty.stored(parameters, block.weights)
        assert back.keys() == block.weights.keys()
        for key, value in back.items():
            assert torch.equal(value, model[block.weights[key].name])
        # A part of what one tensor holds is put back beside the rest of it.
        for key in shapes:
            for stored, value in empty.stored({key: parameters[key]}, block.weights).items():
                assert torch.equal(value, model[block.weights[stored].name])


# --- a whole round ---


@dataclass
class Round:
    """Block 3 is fused into those around it."""

    folder: Path
    dense: Stack
    out: Path

    def __post_init__(self) -> None:
        self.runner = Runner(self.dense, CPU, torch.float32, batch_size=8)
        values = {"learning_rate": 0.01, "lora_learning_rate": 0.002}
        self.job = GroupFusion(
            self.dense, self.dense, DONOR, settings(**values), True, 0, str(self.out)
        )

    def student(self) -> Span:
        trunk = self.runner.trunk
        return self.job.build(trunk.meta_blocks, trunk.contexts(BATCH, 7), CPU, torch.float32)

    def run(self, epochs: int = 6) -> tuple[list[float], Stack]:
        """The losses, and the stack with the blocks that were written."""
        student, s = self.student(), self.job.settings
        config = TrainingConfig(s.loss, s.batch, s.epochs, s.betas, s.eps)
        steps = epochs * len(IDS) // BATCH
        groups = self.job.parameter_groups(student)
        stepper = TorchStepper.make(student, groups, config, steps, CPU)
        states = States(*self.job.source.walk(self.runner, IDS))
        losses = train(stepper, lambda _: states.batches(BATCH), epochs, lambda *_: None)
        saved = self.job.save(student).blocks
        return losses, self.dense.drop(DONOR).swap(saved)

    def parameters(self, stack: Stack, dense: int) -> Tensors:
        block = stack.blocks[stack.position(dense)]
        return dict(self.runner.trunk.meta_blocks[dense].read(block.weights))


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_a_round_begins_with_the_plain_blocks_and_learns(name: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    dense = open_stack(save_split(name, tmp_path / "model"))
    lab = Round(tmp_path / "model", dense, tmp_path / "out")
    entering, _ = lab.job.source.walk(lab.runner, IDS)
    entering = plain = entering[:BATCH]
    with torch.no_grad():
        for block in lab.job.neighbours:
            plain = lab.runner.apply(lab.runner.weights.of(block), block.dense, plain)
        assert torch.equal(lab.student()(entering), plain)
    losses, stack = lab.run()
    assert losses[-1] < losses[0]
    for block in lab.job.neighbours:
        before, after = lab.parameters(dense, block.dense), lab.parameters(stack, block.dense)
        (file,) = {
            ref.file for ref in stack.blocks[stack.position(block.dense)].terms.learned.values()
        }
        p, donor = load_file(file), lab.parameters(dense, DONOR)
        for key, value in before.items():
            if f"{key}.B" not in p:
                continue
            turn = (lambda t: t.mT) if name == "gpt_oss" else (lambda t: t)
            for e in range(len(value)):
                wanted = value[e] + turn(p[f"{key}.B"][e] @ p[f"{key}.A"][e])
                if donor.get(key, value[:0]).shape == value.shape:
                    wanted = wanted + turn(p[f"{key}.C0"][e] @ p[f"{key}.D0"][e]) * donor[key][e]
                torch.testing.assert_close(after[key][e], wanted)
            assert not torch.equal(after[key], value)  # of experts, those that tokens went to
        routers = [key for key in before if "router" in key or key.startswith("mlp.gate.")]
        assert routers or (name, block.dense) == ("deepseek_v3", 0)
        assert all(torch.equal(before[key], after[key]) for key in routers)


def test_a_dense_block_takes_no_experts(tmp_path: Path) -> None:
    """Of a donor of another kind, only the layers of the same name and shape are fused."""
    dense = open_stack(save_split("deepseek_v3", tmp_path))
    job = GroupFusion(dense, dense, 1, settings(), True, 0, str(tmp_path / "out"))
    assert job.other_kinds() == [
        "block 0 is of another kind than block 1: 4 of its 7 layers take in that block's"
    ]
    runner = Runner(dense, CPU, torch.float32, 8)
    trunk = runner.trunk
    span = job.build(trunk.meta_blocks, trunk.contexts(BATCH, 7), CPU, torch.float32)
    names = [name for name, _ in span.learned.blocks[0].named_parameters()]
    assert "self_attn.o_proj.C0" in names
    assert not any(name.startswith("mlp.") and name.endswith("C0") for name in names)
    assert "mlp.experts.down_proj.C0" in dict(span.learned.blocks[1].named_parameters())


@pytest.mark.parametrize("name", ["mixtral", "granitemoeshared"])
def test_the_layout_changes_nothing(name: str, tmp_path: Path) -> None:
    rounds = []
    for layout in (save_split, save_merged):
        folder = tmp_path / layout.__name__
        folder.mkdir()
        lab = Round(folder, open_stack(layout(name, folder)), tmp_path / f"out-{layout.__name__}")
        rounds.append((lab, *lab.run(1)))
    (one, losses, split), (other, again, merged) = rounds
    assert losses == again
    for block in one.job.neighbours:
        ours, theirs = (
            lab.parameters(s, block.dense) for lab, s in ((one, split), (other, merged))
        )
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        written = split.blocks[split.position(block.dense)].weights
        original = one.dense.blocks[block.dense].weights
        assert written.keys() == original.keys()
        assert all(
            read_tensors({key: written[key]})[key].shape == original[key].shape for key in written
        )
