"""A model with NaN or Inf in its weights, or whose arithmetic overflows: one message that names
the tensor, and nothing written.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from desk import LENGTH, Desk
from mistakes import MESSAGE, tree
from safetensors.torch import load_file, save_file

from fusegpt_ray.cli import main
from fusegpt_ray.model import finite
from fusegpt_ray.store.checkpoint import TensorRef

SINGLE = "model.safetensors"
EMBEDDING, MATRIX, NORM = (
    "model.embed_tokens.weight",
    "model.layers.3.mlp.up_proj.weight",
    "model.norm.weight",
)


def spoil(desk: Desk, name: str, change: Callable[[torch.Tensor], object]) -> None:
    held = load_file(desk.model / SINGLE)
    change(held[name])
    save_file(held, desk.model / SINGLE, metadata={"format": "pt"})


def at(place: int, value: float) -> Callable[[torch.Tensor], object]:
    def change(tensor: torch.Tensor) -> None:
        tensor.view(-1)[place] = value

    return change


def evaluation(desk: Desk) -> dict[str, object]:
    return {"evaluation": {"heldout": {"data": str(desk.heldout)}}}


def told(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """The parts of the message that ends a command; what stood before it were stages."""
    assert main(arguments) == 2
    stdout, stderr = capsys.readouterr()
    assert stdout == "" and "Traceback" not in stderr
    message = MESSAGE.fullmatch(stderr[stderr.index("error: ") :].rstrip("\n"))
    assert message, stderr
    return message.groupdict()


@pytest.mark.parametrize("name", [EMBEDDING, MATRIX, NORM, "lm_head.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_compress_names_the_tensor_and_leaves_nothing(
    name: str, value: float, desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(
        desk, name, at({MATRIX: -1, NORM: 5}.get(name, 10 * 32), value)
    )  # of the embedding and the head: of the token w10
    desk.heldout.write_text(desk.heldout.read_text().replace("w", "w10 w", 1))
    recipe = desk.write(**evaluation(desk))
    before = tree(desk.folder)
    message = told(["compress", recipe], capsys)
    assert message["key"] == "model.source" and "model'" in message["value"]
    assert f"tensor {name} holds NaN or Inf" in message["problem"] and SINGLE in message["problem"]
    assert tree(desk.folder) == before


def only_fine_tuning_meets_it(desk: Desk) -> str:
    """A NaN in the row of a token that only windows for fine-tuning have; the recipe's path."""
    spoil(desk, EMBEDDING, at(10 * 32, float("nan")))
    text = desk.folder / "calibration.txt"
    ids = text.read_text().replace("w10 ", "w11 ").split()
    first = random.Random(0).randint(0, len(ids) - LENGTH - 1)
    scored = range(first, first + LENGTH)
    text.write_text(" ".join(word if place in scored else "w10" for place, word in enumerate(ids)))
    return desk.write(importance={"windows": 1, "batch": 1})


def test_a_row_that_only_fine_tuning_meets(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    """No scored and no held-out text has the token: the loss tells, and blames no learning rate."""
    recipe = only_fine_tuning_meets_it(desk)
    before = tree(desk.folder)
    assert main(["score", recipe]) == 0
    capsys.readouterr()
    assert f"tensor {EMBEDDING} holds" in told(["compress", recipe], capsys)["problem"]
    assert tree(desk.folder) == before


@pytest.mark.parametrize("verb", ["score", "evaluate"])
def test_the_other_verbs_say_the_same(
    verb: str, desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(desk, MATRIX, at(7, float("nan")))
    arguments = (
        [desk.write()]
        if verb == "score"
        else ["model", "--data", "heldout.txt", "--length", str(LENGTH)]
    )
    message = told([verb, *arguments], capsys)
    assert message["key"] == ("model.source" if verb == "score" else "MODEL")
    assert f"tensor {MATRIX} holds NaN or Inf" in message["problem"]


def test_the_first_of_them_is_named(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    for name in (MATRIX, NORM, EMBEDDING):
        spoil(desk, name, at(0, float("inf")))
    assert f"tensor {EMBEDDING} holds" in told(["score", desk.write()], capsys)["problem"]


def test_arithmetic_that_overflows_is_told_apart(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(desk, MATRIX, lambda tensor: tensor.fill_(3e38))
    recipe = desk.write()
    before = tree(desk.folder)
    message = told(["compress", recipe, "--set", "model.dtype=bfloat16"], capsys)
    assert (
        "its stored weights are finite" in message["problem"]
        and "bfloat16 overflows" in message["problem"]
    )
    assert message["fix"] == "set model.dtype to float32"
    assert told(["compress", recipe], capsys)["fix"] == "use another checkpoint"
    assert tree(desk.folder) == before
    evaluate = [
        "evaluate",
        "model",
        "--data",
        "heldout.txt",
        "--length",
        str(LENGTH),
        "--dtype",
        "bfloat16",
    ]
    assert told(evaluate, capsys)["fix"] == "set --dtype to float32"


def test_folders_that_were_there_stay(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    spoil(desk, MATRIX, at(0, float("nan")))
    (desk.folder / "out").mkdir()
    recipe = desk.write(output={"uri": str(desk.out / "deep/deeper"), "name": "demo"})
    told(["compress", recipe], capsys)
    assert desk.out.is_dir() and not list(desk.out.iterdir())


def test_an_earlier_attempt_of_the_same_run_stays(
    desk: Desk, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What began the journal, and noted its scores, was another process: not ours to remove."""
    recipe = only_fine_tuning_meets_it(desk)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fusegpt_ray.training.finetune.train_and_save", interrupted)
        assert main(["compress", recipe]) == 130
    capsys.readouterr()
    notes = (desk.out / "demo.run/scores-001.json").read_bytes()
    assert f"tensor {EMBEDDING} holds" in told(["compress", recipe], capsys)["problem"]
    assert (desk.out / "demo.run/identity.json").exists()
    assert (desk.out / "demo.run/scores-001.json").read_bytes() == notes


def test_a_good_run_looks_at_no_weight(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(refs: dict[str, TensorRef]) -> dict[str, torch.Tensor]:
        raise AssertionError(refs)

    monkeypatch.setattr(finite, "read_tensors", never)
    assert main(["compress", desk.write(method="mi", sparsity=0.2, **evaluation(desk))]) == 0
    assert Path(desk.out / "demo-p20/fusegpt.json").exists()


def test_tensors_are_read_one_by_one(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(desk, NORM, at(0, float("nan")))
    asked: list[int] = []
    read = finite.read_tensors

    def counted(refs: dict[str, TensorRef]) -> dict[str, torch.Tensor]:
        asked.append(len(refs))
        return read(refs)

    monkeypatch.setattr(finite, "read_tensors", counted)
    assert (
        NORM
        in told(["evaluate", "model", "--data", "heldout.txt", "--length", str(LENGTH)], capsys)[
            "problem"
        ]
    )
    assert set(asked) == {1} and len(asked) > 40
