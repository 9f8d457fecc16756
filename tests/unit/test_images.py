"""Samples with images: what is computed block by block is what the model's own class computes of
each sample alone, and what is removed, trained and measured follows from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from models import DEPTH, open_stack, without_blocks
from pictures import (
    ADDING,
    ANSWER,
    BLOCKS,
    IMAGE,
    SEEING,
    load_seeing,
    passes,
    samples,
    save_seeing,
)
from runners import local_workers

from fusegpt_ray.errors import UserError
from fusegpt_ray.importance.scoring import score
from fusegpt_ray.measuring import evaluation
from fusegpt_ray.model.runner import Runner
from fusegpt_ray.recipe.sections import Importance
from fusegpt_ray.samples import PADDING, Counting, InMemoryInputs, Samples, mixed

CPU = torch.device("cpu")
Folders = Callable[[str], Path]


@pytest.fixture(name="seeing", scope="session")
def _seeing(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root = tmp_path_factory.mktemp("seeing")

    def get(name: str) -> Path:
        folder = root / name
        return folder if folder.exists() else save_seeing(name, folder)

    return get


def walked(folder: Path, given: Samples) -> torch.Tensor:
    runner = Runner(open_stack(folder), CPU, torch.float32, batch_size=3)
    for h_WTD in runner.walk(runner.stack, given):  # noqa: B007 - the last states are wanted
        pass
    return h_WTD


@pytest.mark.parametrize("name", SEEING)
def test_a_walk_is_the_classs_own_pass(name: str, seeing: Folders) -> None:
    """To the last bit, with positions and masks around each sample's own image; and other pixels
    give other states.
    """
    folder, given = seeing(name), samples(name)
    found = walked(folder, given)
    for row, (states, _) in enumerate(passes(load_seeing(folder), given)):
        assert torch.equal(found[row, : len(states)], states)
        assert not found[row, len(states) :].any()
    held = [dict(inputs.load()) for inputs in given.inputs]
    other = [InMemoryInputs({**each, "pixel_values": each["pixel_values"] + 1}) for each in held]
    changed = walked(folder, replace(given, inputs=tuple(other)))
    assert (changed[:, -ANSWER:] - found[:, -ANSWER:])[0].abs().max() > 1e-3


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "paligemma"])
def test_windows_of_text_pass_together_beside_samples(name: str, seeing: Folders) -> None:
    """In parts of two, four, … rows, but for those that do not fill their row, and the samples;
    these are still the class's own passes to the last bit.
    """
    seen = samples(name, 2)
    tokens_WT = np.random.default_rng(1).integers(3, IMAGE - 3, (10, seen.shape[1]))
    tokens_WT[9, -4:] = PADDING
    given = mixed(tokens_WT, np.array([0, 1, 0, 0, 0, 1, 0, 0, 0, 0]), {1: seen})
    assert isinstance(given, Samples)
    runner = Runner(open_stack(seeing(name)), CPU, torch.float32, batch_size=10)
    rows, model = list[int](), load_seeing(seeing(name))
    kind = type(model.get_submodule(BLOCKS)[0])

    def count(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if isinstance(module, kind) and not args[0].is_meta:
            rows.append(len(args[0]))

    h_WTD, owns = runner.enter(given)
    hook = torch.nn.modules.module.register_module_forward_pre_hook(count)
    for block, module in runner.weights.walk(runner.stack.blocks):
        h_WTD = runner.apply(module, block.dense, h_WTD, owns)
    hook.remove()
    assert sorted(rows) == sorted([4, 2, 1, 1, 1, 1] * DEPTH)
    for row, (states, _) in enumerate(passes(model, given)):
        if given.images_WT[row].any() or row == 9:
            assert torch.equal(h_WTD[row, : len(states)], states)
        else:
            assert torch.allclose(h_WTD[row], states, atol=1e-5)


def by_hand(folder: Path, given: Samples, tokens: Counting) -> list[float]:
    """The Macro Influence of each block, by whole passes of the real model without it."""
    model = load_seeing(folder)
    full, scores = passes(model, given), []
    for out in range(DEPTH):
        short = without_blocks(model, "llava", [b for b in range(DEPTH) if b != out])
        terms: list[float] = []
        for row, ((a, _), (b, _)) in enumerate(zip(full, passes(short, given), strict=True)):
            influence = 1 - torch.cosine_similarity(a.double(), b.double(), dim=-1).numpy()
            image = given.images_WT[row, : len(a)]
            which = {"all": image | ~image, "text": ~image, "image": image}[tokens]
            terms += influence[which].tolist()
        scores.append(sum(terms) / len(terms))
    return scores


@pytest.mark.parametrize("tokens", ["all", "text", "image"])
@pytest.mark.parametrize("name", SEEING)
def test_scores_are_those_of_whole_passes(name: str, tokens: Counting, seeing: Folders) -> None:
    folder, given = seeing(name), samples(name)
    settings = Importance(all=True, windows=len(given), batch=2, tokens=tokens)
    with local_workers(folder, settings) as workers:
        found = score(workers, open_stack(folder), given, settings)
    expected = by_hand(folder, given, tokens)
    first = ADDING.get(name, 0)
    assert list(found.scores.values())[first:] == pytest.approx(expected[first:], rel=1e-4)


@pytest.mark.parametrize("tokens", ["all", "text"])
def test_a_loss_without_a_block_is_that_of_the_answers(tokens: Counting, seeing: Folders) -> None:
    """As their perplexity is; what the model guesses in place of an image is no prediction."""
    folder, given = seeing("llava"), samples("llava")
    model, expected = load_seeing(folder), []
    for out in range(DEPTH):
        short = without_blocks(model, "llava", [b for b in range(DEPTH) if b != out])
        losses: list[float] = []
        for row, (_, logits) in enumerate(passes(short, given)):
            ids = torch.tensor(given.tokens_WT[row, : len(logits)])
            loss = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")
            losses += loss[-ANSWER:].tolist()
        expected.append(sum(losses) / len(losses))
    settings = Importance(metric="loss", all=True, windows=len(given), batch=2, tokens=tokens)
    with local_workers(folder, settings) as workers:
        found = score(workers, open_stack(folder), given, settings)
        assert list(found.scores.values()) == pytest.approx(expected, rel=1e-4)
        images = settings.model_copy(update={"tokens": "image"})
        with pytest.raises(UserError, match="no such tokens"):
            score(workers, open_stack(folder), given, images)


def test_which_tokens_count_is_not_all_the_same(seeing: Folders) -> None:
    ways: tuple[Counting, ...] = ("all", "text", "image")
    found = [by_hand(seeing("llava"), samples("llava"), tokens) for tokens in ways]
    assert all(abs(a - b) > 1e-3 for a, b in zip(found[1], found[2], strict=True))


@pytest.mark.parametrize("name", SEEING)
def test_a_perplexity_is_that_of_the_answers(name: str, seeing: Folders) -> None:
    folder, given = seeing(name), samples(name)
    losses: list[float] = []
    for row, (_, logits) in enumerate(passes(load_seeing(folder), given)):
        ids = torch.tensor(given.tokens_WT[row, : len(logits)])
        loss = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")
        losses += loss[-ANSWER:].tolist()
    with local_workers(folder, Importance(batch=3)) as workers:
        found = evaluation.perplexity(workers, open_stack(folder), given)
        assert evaluation.compare_source(workers, given).problem == ""
    assert found == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
