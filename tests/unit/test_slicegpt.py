"""Whole runs that make a model narrower, from the recipe to plain `from_pretrained`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backwards import Backwards
from desk import LENGTH, Desk
from mistakes import Bad, check, table
from models import load_model, save_tiny
from safetensors.torch import load_file
from torch import nn
from words import add_tokenizer

from fusegpt_ray.errors import UserError
from fusegpt_ray.fusion import narrowing
from fusegpt_ray.fusion.rotation import READS, WRITES, principal_axes
from fusegpt_ray.fusion.width import Width
from fusegpt_ray.model.source import Source
from fusegpt_ray.pipeline import compress
from fusegpt_ray.planning.plan import plan
from fusegpt_ray.publishing.publish import Published
from fusegpt_ray.recipe.cluster_section import Cluster
from fusegpt_ray.recipe.recipe import Recipe
from fusegpt_ray.recipe.sections import Importance
from fusegpt_ray.run.status import status
from fusegpt_ray.samples import PADDING
from fusegpt_ray.terminal.display import Display
from fusegpt_ray.workers.base import Setup
from fusegpt_ray.workers.local import LocalWorkers


def recipe(desk: Desk, **changes: Any) -> Recipe:
    held = {"heldout": {"data": str(desk.heldout), "bos": "never"}}
    sections = {"method": "slicegpt", "sparsity": 0.25, "evaluation": held}
    calibration = desk.recipe()["calibration"] | {"windows": 14, "bos": "never"}
    return Recipe.load(desk.write(**(sections | {"calibration": calibration} | changes)))


def ids_of(file: Path) -> torch.Tensor:
    """Whole windows of a text."""
    ids = torch.tensor([int(word[1:]) for word in file.read_text().split()])
    return ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)


def axes_by_hand(model: Any, windows: np.ndarray) -> torch.Tensor:
    """[D, D]: what the dense model's norms read, each row divided by its root mean square, in
    plain torch.
    """
    seen: list[torch.Tensor] = []
    norms = [block.get_submodule(name) for block in model.model.layers for name in READS]
    for module in [*norms, model.model.norm]:
        module.register_forward_pre_hook(lambda _, given: seen.append(given[0].flatten(0, 1)))
    with torch.no_grad():
        model(input_ids=torch.from_numpy(windows).long())
    eps = model.config.rms_norm_eps
    covariance = torch.zeros(model.config.hidden_size, model.config.hidden_size).double()
    for h_nD in seen:
        for h_D in h_nD.double():
            x_D = h_D / (h_D.square().sum() / len(h_D) + eps).sqrt()
            covariance += torch.outer(x_D, x_D)
    return principal_axes(covariance)[0]


@torch.no_grad()
def perplexity(model: Any, rows: torch.Tensor) -> float:
    logits = model(input_ids=rows).logits[:, :-1]
    return float(nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).exp())


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen3"])
def test_what_is_published_is_the_dense_model_on_projected_states(
    name: str, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the text to the perplexity of what plain `from_pretrained` loads."""
    (desk.model / "model.safetensors").unlink()
    save_tiny(name, desk.model)
    add_tokenizer(desk.model)
    drawn: list[np.ndarray] = []
    real = narrowing.Narrowing.on

    def noted(self: Any, workers: Any, windows: Any) -> Any:
        drawn.append(windows)
        return real(self, workers, windows)

    monkeypatch.setattr(narrowing.Narrowing, "on", noted)
    output = {"uri": str(desk.out), "name": "demo"}  # with its report
    (published,) = compress(recipe(desk, output=output), Display())
    page = (Path(published.uri) / "report.html").read_text()
    assert "32 → 24" in page and "<em>sliced</em>" in page and "<em>fused</em>" not in page
    axes_DK = principal_axes_of(desk, drawn[0])
    dense = load_model(desk.model)
    writers = [block.get_submodule(key) for block in dense.model.layers for key in WRITES]
    onto_DD = (axes_DK @ axes_DK.T).float()
    for module in [dense.model.embed_tokens, *writers]:
        module.register_forward_hook(lambda module, given, out: out @ onto_DD)
    made, rows = load_model(Path(published.uri)), ids_of(desk.heldout)
    with torch.no_grad():
        wanted, found = dense(input_ids=rows).logits, made(input_ids=rows).logits
    # Tensors are stored in float32, and both models compute in it.
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    told = published.manifest["perplexity"]["heldout"]
    assert told["sliced"] == pytest.approx(perplexity(made, rows), rel=1e-4)
    assert made.config.hidden_size == 24 and made.config.num_hidden_layers == 5
    assert published.manifest["width"]["kept"] == 24 and published.manifest["removed"] == []
    card = (Path(published.uri) / "README.md").read_text()
    assert "hidden size 32 → 24" in card and "width-pruning" in card
    (model,) = status(str(desk.out))["models"]
    assert model["width"] == published.manifest["width"] and model["blocks"] == 5
    assert "blocks removed" not in card and "dropped" not in card


def principal_axes_of(desk: Desk, windows: np.ndarray) -> torch.Tensor:
    return axes_by_hand(load_model(desk.model), windows)[:, :24]


class Killed(BaseException):
    """Nothing handles it."""


@pytest.mark.parametrize("moment", ["_axes", "_rotate"])
def test_a_run_that_is_killed_ends_with_the_same_bytes(
    moment: str, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = recipe(desk, output={"uri": str(desk.out), "name": "undisturbed"})
    (undisturbed,) = compress(other, Display())
    real = getattr(narrowing, moment)

    def kills(*arguments: Any) -> Any:
        real(*arguments)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(narrowing, moment, kills)
        with pytest.raises(Killed):
            compress(recipe(desk), Display())
    (published,) = compress(recipe(desk), Display())
    assert weights(published) == weights(undisturbed)
    assert not list(desk.out.glob("*.run")), "nothing is left of it"


def weights(published: Published) -> bytes:
    return (Path(published.uri) / "model.safetensors").read_bytes()


def test_after_its_round_a_run_goes_on_from_it(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    from fusegpt_ray.compressing import compression

    def kills(*arguments: Any, **options: Any) -> Any:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(compression, "publish", kills)
        with pytest.raises(Killed):
            compress(recipe(desk), Display())
    with monkeypatch.context() as patch:
        patch.setattr(narrowing.Narrowing, "on", kills)
        (published,) = compress(recipe(desk), Display())
    made = load_file(Path(published.uri) / "model.safetensors")
    assert made["model.norm.weight"].tolist() == [1.0] * 24


def narrowed(
    model: Path, out: Path, kind: type[LocalWorkers], windows: np.ndarray, weights: Any = "resident"
) -> narrowing.Narrowed:
    source = Source.find(str(model), None)
    dense = source.stack()
    cluster = Cluster(engine="local", weights=weights)
    setup = Setup(source, dense, cluster, importance=Importance(batch=2))
    with kind(setup) as workers:
        return narrowing.Narrowing(dense, Width(32, 24), str(out)).on(workers, windows)


@pytest.mark.parametrize("weights", ["resident", "streamed"])
def test_replicas_and_their_order_change_no_bit(weights: str, desk: Desk, tmp_path: Path) -> None:
    windows = np.random.default_rng(0).integers(3, 90, (13, LENGTH)).astype(np.int32)
    one = narrowed(desk.model, tmp_path / "one", LocalWorkers, windows)
    several = narrowed(desk.model, tmp_path / "several", Backwards, windows, weights)
    assert [*one.files.values()] == [*several.files.values()]
    assert one.to_record() == several.to_record()
    if weights == "streamed":
        whole = sum(
            ref.end - ref.begin
            for block in Source.find(str(desk.model), None).stack().blocks
            for ref in block.weights.values()
        )
        assert several.bytes_read == 3 * whole, "each replica reads once, whatever the pieces"


def test_padding_counts_nowhere(desk: Desk, tmp_path: Path) -> None:
    """Windows of which the second half is padding have the axes of their first halves."""
    windows = np.random.default_rng(1).integers(3, 90, (6, LENGTH)).astype(np.int32)
    short = windows.copy()[:, : LENGTH // 2]
    windows[:, LENGTH // 2 :] = PADDING
    padded = narrowed(desk.model, tmp_path / "padded", LocalWorkers, windows)
    alone = narrowed(desk.model, tmp_path / "alone", LocalWorkers, short)
    assert padded.kept == pytest.approx(alone.kept, rel=1e-6)
    one, other = (
        load_file(next(uri for uri in found.files if "block-002" in uri))
        for found in (padded, alone)
    )
    for name, value in one.items():  # attention to 12 places adds in another order than to 6
        torch.testing.assert_close(value, other[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"sparsity": [0.25, 0.5]}, "makes another model for each"),
        ({"sparsity": 0.01}, "the nearest multiple of 8"),
    ],
)
def test_what_it_cannot_do_is_refused(changes: dict[str, Any], why: str, desk: Desk) -> None:
    with pytest.raises(UserError, match=why):
        plan(recipe(desk, **changes), Display())
    assert not desk.out.exists()


def sliced(name: str) -> Callable[[Desk], list[str]]:
    """The recipe for another model."""

    def make(desk: Desk) -> list[str]:
        for file in desk.model.iterdir():
            file.unlink()
        save_tiny(name, desk.model)
        add_tokenizer(desk.model)
        return ["compress", desk.write(method="slicegpt", sparsity=0.25)]

    return make


NORM_BEHIND = "what post_feedforward_layernorm.weight does"
MISTAKES = [
    Bad("no RMSNorm", sliced("gpt2"), "model.source", "GPT2", "needs RMSNorm", "method: mi"),
    Bad("norms behind", sliced("gemma3"), "model.source", "Gemma3", NORM_BEHIND, "method: mi"),
]


@table(MISTAKES)
def test_a_model_that_cannot_be_sliced_is_refused_before_weights_are_read(
    bad: Bad, desk: Desk, weight_reads: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    check(bad, desk, weight_reads, capsys)


def test_its_cost_is_known_before(desk: Desk) -> None:
    """Bytes to the last one, and the blocks that windows pass."""
    asked = recipe(desk, evaluation={"heldout": {"data": str(desk.heldout), "windows": 4}})
    planned = plan(asked, Display())
    (published,) = compress(asked, Display())
    files = Path(published.uri).glob("*.safetensors")
    tensors = [value for file in files for value in load_file(file).values()]
    assert [*planned.cost.published_bytes.values()] == [sum(value.nbytes for value in tensors)]
    walked = {stage.name: stage.block_forwards for stage in planned.cost.stages}
    assert walked == {"states": 14 * 5, "slicing": 0, "evaluation": 4 * 5 * 2}
    told = json.loads((Path(published.uri) / "fusegpt.json").read_text())
    assert told["rounds"][0]["width"] == told["width"]
    assert 0.75 < told["width"]["variance"] < 1
