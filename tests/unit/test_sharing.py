"""Groups of blocks that share weights: the stack's verb, and healing beside plain torch with
modules that are tied.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from desk import Desk
from experts import save_split
from infirmary import BATCH, HELD, STEPS, TRAINED, Infirmary, Stopped, kl, rate
from mistakes import Bad, check, table
from models import load_model
from safetensors.torch import load_file
from stopped_runs import Watching
from torch import nn

from fusegpt_ray.cost.footprint import healing_bytes
from fusegpt_ray.healing.sharing import Sharing
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.pipeline import compress
from fusegpt_ray.planning.plan import plan
from fusegpt_ray.recipe.recipe import Recipe
from fusegpt_ray.recipe.sections import Heal
from fusegpt_ray.terminal.display import Display
from fusegpt_ray.training.finetune import Trained

PAGE = Path(__file__).parents[2] / "docs/output.md"


@pytest.fixture(name="infirmary")
def _infirmary(
    request: pytest.FixtureRequest, checkpoint: Callable[[str], Path], tmp_path: Path
) -> Infirmary:
    """Its four blocks left form two groups."""
    name = getattr(request, "param", "llama")
    place = Infirmary(name, checkpoint(name), tmp_path)
    depth = len(place.dense)
    place.stack = Sharing(2).of(place.dense.drop(*range(2, 2 + depth - 4)))
    assert len(place.stack) == 4
    return place


def tied(place: Infirmary) -> tuple[Any, Any]:
    """The real student, in which linear layers of a group are one module; and the teacher."""
    student, teacher = place.plain()
    blocks = place.blocks_of(student)
    for first, second in ((0, 1), (2, 3)):
        for path, module in list(blocks[first].named_modules()):
            if isinstance(module, nn.Linear):
                blocks[second].set_submodule(path, module)
    return student, teacher


def files_of(trained: Trained) -> list[bytes]:
    return [Path(uri).read_bytes() for uri in sorted(trained.saved.files)]


def test_a_group_refers_to_the_matrices_of_its_first(infirmary: Infirmary) -> None:
    dense, stack = infirmary.dense, infirmary.stack
    for first, second in (stack.blocks[:2], stack.blocks[2:]):
        own = dense.blocks[second.dense].weights
        assert first == dense.blocks[first.dense] and second.shares == first.dense
        for name, ref in second.weights.items():
            assert ref == (own if "norm" in name else first.weights)[name]
    assert Stack.from_json(stack.to_json()).blocks == stack.blocks
    for group in ((0, 9), (9, 0)):
        with pytest.raises(AssertionError):
            dense.share(*group)


@pytest.mark.parametrize("infirmary", ["llama", "qwen2"], indirect=True)
@pytest.mark.parametrize("micro", [None, 1])
def test_healing_is_adam_on_tied_modules(infirmary: Infirmary, micro: int | None) -> None:
    """A gradient of a group's weight is the sum over its blocks; norms learn apart."""
    highest = 0.001
    trained = infirmary.heal(train="all", learning_rate=highest, cluster={"micro_batch": micro})
    student, teacher = tied(infirmary)
    blocks = infirmary.blocks_of(student).requires_grad_()
    held = [kl(student, teacher, HELD).item()]
    adam = torch.optim.Adam(blocks.parameters(), betas=(0.9, 0.95))
    for step, ids_BT in enumerate(TRAINED.split(BATCH)):
        adam.param_groups[0]["lr"] = rate(step, highest)
        adam.zero_grad()
        kl(student, teacher, ids_BT).backward()
        adam.step()
        held.append(kl(student, teacher, HELD).item())
    assert len(held) == STEPS + 1 and trained.held_out == pytest.approx(held, rel=1e-3)
    assert min(held) == held[-1] < held[0], "or it is not the last state that is kept"
    saved = [
        load_file(next(iter(trained.saved.blocks[n].weights.values())).file)
        for n in infirmary.stack.kept
    ]
    for tensors, block in zip(saved, blocks, strict=True):
        for name, value in tensors.items():
            # As in `test_healing`: Adam makes much of gradients that are little more than rounding.
            assert (value - block.get_parameter(name)).abs().mean() < 2e-2 * highest, name
    for first, second in (saved[:2], saved[2:]):
        for name, value in first.items():
            assert torch.equal(value, second[name]) != ("norm" in name), name


def test_low_rank_updates_are_the_groups_too(infirmary: Infirmary) -> None:
    blocks = infirmary.heal(learning_rate=0.01).saved.blocks
    tensors = [load_file(next(iter(blocks[n].weights.values())).file) for n in infirmary.stack.kept]
    dense = infirmary.dense.blocks[infirmary.stack.kept[0]].weights["mlp.up_proj.weight"]
    assert not torch.equal(
        tensors[0]["mlp.up_proj.weight"], load_file(dense.file)[dense.name].float()
    )
    for name, value in tensors[0].items():
        assert torch.equal(value, tensors[1][name]) != ("norm" in name), name


def test_a_stopped_one_ends_with_the_same_bytes(infirmary: Infirmary) -> None:
    whole = files_of(infirmary.heal(train="all", learning_rate=0.001))
    infirmary.forget()
    with pytest.raises(Stopped):
        infirmary.heal(2, train="all", learning_rate=0.001)
    assert files_of(infirmary.heal(train="all", learning_rate=0.001)) == whole


@pytest.mark.parametrize(
    ("method", "changes", "depth"),
    [
        ("fusegpt", {}, 3),  # with terms that go on learning
        ("mi+linear", {"fusion": {"start": "scale"}}, 3),
        ("streamline", {}, 3),
        ("slicegpt", {}, 5),
    ],
)
def test_whatever_the_method_a_group_is_published_with_the_same_matrices(
    desk: Desk, method: str, changes: dict[str, Any], depth: int
) -> None:
    """And the manifest, the card and the report say which blocks are one."""
    heal: dict[str, Any] = {
        "tokens": 48,
        "batch": 2,
        "held_out": 2,
        "looks": 2,
        "train": "all",
        "share": depth,
    }
    output = {"uri": str(desk.out), "name": "demo", "report": method == "slicegpt"}
    heal["learning_rate"] = 1e-3
    asked = desk.recipe(method=method, heal=heal, output=output, **changes)
    (done,) = compress(Recipe.parse(asked), Watching())
    assert done.manifest["healing"]["groups"] == [done.manifest["kept"]]
    tensors = load_file(Path(done.uri) / "model.safetensors")
    names = {name.split(".", 3)[3] for name in tensors if name.startswith("model.layers.")}
    for name in names:
        blocks = [tensors[f"model.layers.{n}.{name}"] for n in range(depth)]
        assert all(torch.equal(one, blocks[0]) for one in blocks) == ("norm" not in name), name
    which = ", ".join(map(str, done.manifest["kept"]))
    said = f"Blocks that share weights (numbers in the dense model): {which}."
    assert said in (Path(done.uri) / "README.md").read_text()
    if output["report"]:
        page = (Path(done.uri) / "report.html").read_text()
        assert "Which blocks share weights" in page and f"<td>{which}</td>" in page


def test_the_page_tells_how_to_hold_them_once(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines of docs/output.md, as they are: the model computes the same with fewer bytes."""
    heal = {"tokens": 48, "batch": 2, "held_out": 2, "train": "all", "share": 2}
    (done,) = compress(Recipe.parse(desk.recipe(method="mi", sparsity=0.2, heal=heal)), Watching())
    Path(done.uri).rename(desk.folder / "llama-p25")
    monkeypatch.chdir(desk.folder)
    section = PAGE.read_text().split("### Blocks that share weights")[1]
    lines = re.findall(r"```python\n(.*?)```", section, re.DOTALL)[0]
    found: dict[str, Any] = {}
    exec(textwrap.dedent(lines), found)
    once, whole = found["model"].eval(), load_model(desk.folder / "llama-p25")
    with torch.no_grad():
        assert torch.equal(once(TRAINED).logits, whole(TRAINED).logits)
    held, all_of_it = (sum(p.nbytes for p in model.parameters()) for model in (once, whole))
    block = whole.model.layers[0]
    linear = sum(m.weight.nbytes for m in block.modules() if isinstance(m, nn.Linear))
    assert all_of_it - held == 2 * linear


def asked(share: int, sparsity: float | list[float] = 0.4) -> Callable[[Desk], list[str]]:
    """Of 5 blocks."""
    heal = {"share": share, "batch": 2, "held_out": 2}
    return lambda desk: ["compress", desk.write(method="mi", sparsity=sparsity, heal=heal)]


def of_several_kinds(desk: Desk) -> list[str]:
    """Attention in some blocks, a recurrence in others; four are left."""
    (desk.model / "model.safetensors").unlink()
    save_split("jamba", desk.model)
    return asked(2, 0.2)(desk)


KEY = "heal.share"
MISTAKES = [
    Bad("a size that divides no depth", asked(2), KEY, "2", "divide the 3 blocks", r"one of \[3\]"),
    Bad("a size above the depth", asked(6), KEY, "6", "divide the 3 blocks", r"one of \[3\]"),
    Bad(
        "a size that divides one depth of two",
        asked(2, [0.2, 0.4]),
        KEY,
        "2",
        "divide the 3 blocks",
        "another sparsity",
    ),
    Bad("a group of one", asked(1), KEY, "1", "not 2 or more", "a whole number of at least 2"),
    Bad(
        "blocks of several kinds",
        of_several_kinds,
        KEY,
        "2",
        "matrices of several shapes or names",
        "leave it out",
    ),
]


@table(MISTAKES)
def test_what_cannot_share_is_refused_before_weights_are_read(
    bad: Bad, desk: Desk, weight_reads: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    check(bad, desk, weight_reads, capsys)


def test_a_size_that_divides_the_depth_is_taken(desk: Desk) -> None:
    recipe = desk.recipe(method="foldgpt", heal={"share": 3, "batch": 2, "held_out": 2})
    assert plan(Recipe.parse(recipe), Display()).targets


def test_a_group_learns_its_weights_once(desk: Desk) -> None:
    """So there are fewer masters, and their optimizer state."""
    recipe = Recipe.parse(desk.recipe(method="mi", heal={"train": "all", "batch": 2}))
    dense = plan(recipe, Display()).model.stack
    assert recipe.heal
    needed = [
        healing_bytes(
            recipe.model_copy(update={"heal": Heal(**{**vars(recipe.heal), "share": share})}),
            dense,
            torch.float32,
            4,
        )
        for share in (None, 2)
    ]
    assert needed[1] < needed[0]
