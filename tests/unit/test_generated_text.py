"""Text that the dense model writes itself: what the recipe may say, and which tokens it is."""

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
from models import load_model, open_stack
from recipes import mistake, recipe
from scribe import TOKENS, _desk, asked, draw, parts, written  # noqa: F401 - a fixture
from stopped_runs import Watching, contents

from fusegpt_ray.errors import UserError
from fusegpt_ray.model.runner import Runner
from fusegpt_ray.model.sampling import continuations
from fusegpt_ray.planning.plan import plan
from fusegpt_ray.preparing.windows import healing_windows
from fusegpt_ray.recipe.recipe import Recipe
from fusegpt_ray.recipe.text_sections import GeneratedText
from fusegpt_ray.run.shared import Shared
from fusegpt_ray.store.records import opened
from fusegpt_ray.workers import local
from fusegpt_ray.workers.local import LocalWorkers

END = 2
"""The tiny models' end-of-sequence token."""


# --- the recipe ---


def calibration(**keys: Any) -> dict[str, Any]:
    return {"data": [{"data": "a.txt", "weight": 3}, keys], "windows": 8, "length": LENGTH}


def test_what_may_be_said_and_what_it_is_by_default() -> None:
    short = recipe(calibration={"data": [{"generate": "p.txt"}]}).calibration
    (part,) = short.parts
    assert part == GeneratedText(generate="p.txt", temperature=1.0, top_p=1.0, weight=1.0)
    assert part.prompts is not None and part.prompts.data == "p.txt"
    how = {"tokens": 500, "temperature": 0.7, "top_p": 0.9, "weight": 2, "column": "question"}
    asked = recipe(calibration={"data": [{"generate": "q.jsonl", **how}]})
    (part,) = asked.calibration.parts
    assert isinstance(part, GeneratedText) and part.prompts and part.prompts.column == "question"
    assert Recipe.parse(asked.model_dump(mode="json")) == asked
    bare = recipe(heal={"data": [{"generate": True}]}).heal
    assert bare and bare.parts[0] == GeneratedText(generate=True)
    assert GeneratedText(generate=True).prompts is None


@pytest.mark.parametrize(
    ("keys", "where", "problem", "fix"),
    [
        ({"generate": False}, ".generate", "names no prompts", "say true"),
        ({"generate": 7}, ".generate", "not a text", "in quotes"),
        ({"generate": "p.txt", "data": "b.txt"}, "", "both data and generate", "two texts"),
        ({"data": "b.txt", "tokens": 5}, "", "tokens is of text that the model", "leave tokens"),
        ({"generate": "p.txt", "tokens": 0}, ".tokens", "not 1 or more", "whole number"),
        ({"generate": "p.txt", "top_p": 1.5}, ".top_p", "not 1 or less", "give a number"),
        ({"generate": "p.txt", "temperature": 0}, ".temperature", "not above 0", "give a number"),
        ({"generate": "p.txt", "toknes": 5}, ".toknes", "unknown key", "tokens"),
    ],
)
def test_mistakes(keys: dict[str, Any], where: str, problem: str, fix: str) -> None:
    data = recipe().model_dump(mode="json") | {"calibration": calibration(**keys)}
    error = mistake(data)
    assert error.key == f"calibration.data.1{where}"
    assert problem in error.problem and fix in error.fix


def test_a_secret_in_the_prompts_uri_is_refused() -> None:
    uri = "s3://key:secret@bucket/prompts.txt"
    error = mistake({**recipe().model_dump(mode="json"), "calibration": calibration(generate=uri)})
    assert error.key == "calibration.data.1.generate" and "secret@" not in str(error)


# --- the tokens ---


@pytest.mark.parametrize("weights", ["resident", "streamed"])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "llava", "gpt2", "gemma3", "lfm2"])
def test_it_is_what_the_library_generates(
    name: str, weights: Any, checkpoint: Callable[[str], Path]
) -> None:
    folder = checkpoint(name)
    runner = Runner(open_stack(folder), torch.device("cpu"), torch.float32, 4, weights)
    prompts = [np.array(ids) for ids in ([1, 5, 7], [1, 9], [1, 20, 21, 22])]
    before = torch.random.get_rng_state()
    found = continuations(runner, prompts, 20, 0.9, 0.8, [END], 7)
    assert torch.equal(torch.random.get_rng_state(), before)

    ids = torch.tensor([[0, 1, 5, 7], [0, 0, 1, 9], [1, 20, 21, 22]])
    torch.manual_seed(7)
    wanted = load_model(folder).generate(
        input_ids=ids,
        attention_mask=(ids != 0).long(),
        do_sample=True,
        temperature=0.9,
        top_p=0.8,
        top_k=0,
        max_length=20,
        eos_token_id=END,
        pad_token_id=0,
    )
    for tokens, row in zip(found, wanted[:, 4:].tolist(), strict=True):
        assert tokens.tolist() == (row[: row.index(END) + 1] if END in row else row)


def test_neither_the_order_of_the_replicas_nor_the_amount_changes_it(
    desk: Desk, checkpoint: Callable[[str], Path]
) -> None:
    one = draw(asked(desk))
    text = written(desk)
    assert len(text) >= TOKENS and END in text and len(parts(desk)) >= 3
    origin = one.protocol["generated"]
    assert origin == {
        "prompts": str(desk.folder / "prompts.txt"),
        "tokens": TOKENS,
        "temperature": 1.0,
        "top_p": 1.0,
    }
    flat = np.array(text[:TOKENS])
    for window_T in one.tokens_WT:
        stretches = np.lib.stride_tricks.sliding_window_view(flat, LENGTH)
        assert (stretches == window_T).all(axis=1).any()

    elsewhere = {"output": {"uri": str(desk.folder / "elsewhere"), "name": "demo"}}
    other = draw(asked(desk, elsewhere), kind=Backwards)
    assert other.tokens_WT.tobytes() == one.tokens_WT.tobytes()
    assert contents(desk.folder / "elsewhere") == contents(desk.out)

    draw(asked(desk, elsewhere, tokens=3 * TOKENS))
    more = contents(desk.folder / "elsewhere")
    assert contents(desk.out).items() <= more.items() and len(more) > len(parts(desk))
    fewer = draw(asked(desk, tokens=LENGTH + 1))
    assert fewer.protocol["text_tokens"] == LENGTH + 1


@pytest.mark.parametrize(
    "change", [{"temperature": 0.5}, {"top_p": 0.5}, {"generate": True}, {"seed": 1}]
)
def test_other_settings_are_another_text(change: dict[str, Any], desk: Desk) -> None:
    draw(asked(desk))
    first = written(desk)
    section = asked(desk, **{key: value for key, value in change.items() if key != "seed"})
    if "seed" in change:
        section = Recipe.parse(
            section.model_dump(mode="json")
            | {"calibration": section.calibration.model_dump(mode="json") | change}
        )
    draw(section)
    folders = sorted(desk.out.glob("generated-*"))
    assert len(folders) == 2
    texts = [opened((folder / "part-000000.json").read_bytes())["tokens"] for folder in folders]
    assert texts[0] != texts[1] and first[:5] in (texts[0][:5], texts[1][:5])


def test_left_out_it_is_as_long_as_its_windows_and_one_more(desk: Desk) -> None:
    heal = {"batch": 4, "held_out": 4, "tokens": 12 * LENGTH}
    recipe = asked(desk, {"heal": heal}, tokens=None)
    assert draw(recipe).protocol["text_tokens"] == (8 + 1) * LENGTH
    planned = plan(recipe, Watching())
    with LocalWorkers(planned.setup) as workers:
        train, held_out = healing_windows(workers, recipe, None, Watching(), Shared())
    assert train.protocol["generated"]["tokens"] == (12 + 4 + 1) * LENGTH
    assert held_out.tokens_WT.shape == (4, LENGTH)
    assert len(list(desk.out.glob("generated-*"))) == 1
    found = {stage.name: stage.block_forwards for stage in planned.cost.stages}
    assert found["generating"] == (12 + 4 + 1) * len(planned.model.stack)


# --- what is refused ---


def refused(asked: Recipe) -> UserError:
    with pytest.raises(UserError) as caught:
        draw(asked)
    return caught.value


@pytest.mark.parametrize(
    ("name", "text", "key", "problem"),
    [
        ("p.txt", "", "calibration.data.0", "empty"),
        ("p.jsonl", "", "calibration.data.0", "empty"),
        ("p.txt", "\n \n", "calibration.data.0", "holds nothing but white space"),
        ("p.jsonl", '{"text": " "}', "calibration.data.0.column", "is empty there"),
        ("p.jsonl", '{"body": "w5"}', "calibration.data.0.column", "no such column"),
        ("p.txt", None, "calibration.data.0", "no such file"),
    ],
)
def test_prompts_that_are_none(
    name: str, text: str | None, key: str, problem: str, desk: Desk, weight_reads: list[str]
) -> None:
    if text is not None:
        (desk.folder / name).write_text(text)
    error = refused(asked(desk, generate=str(desk.folder / name)))
    assert error.key == key and problem in error.problem
    assert not weight_reads and not desk.out.exists()


def test_a_tokenizer_without_a_token_to_begin_with(desk: Desk) -> None:
    file = desk.model / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    del settings["bos_token"]
    file.write_text(json.dumps(settings))
    with pytest.raises(UserError, match="no beginning-of-sequence token") as caught:
        plan(asked(desk, generate=True), Watching())
    assert caught.value.key == "calibration.data.0.generate"
    assert draw(asked(desk)).protocol["generated"]["tokens"] == TOKENS


def test_a_model_that_does_not_fit(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "device_bytes", lambda _: 100_000)
    error = refused(asked(desk))
    assert error.key == "calibration.data.0.generate"
    assert "for the whole model, and has 100.0 kB" in error.problem


def test_a_model_that_ends_at_once(desk: Desk) -> None:
    file = desk.model / "config.json"
    settings = json.loads(file.read_text()) | {"eos_token_id": list(range(101))}
    file.write_text(json.dumps(settings))
    error = refused(asked(desk))
    assert "ends its text at once" in error.problem and "other prompts" in error.fix


def test_too_few_tokens_for_healing(desk: Desk) -> None:
    heal = {"batch": 4, "held_out": 4, "tokens": 40 * LENGTH}
    recipe = asked(desk, {"heal": heal}, tokens=9 * LENGTH)
    planned = plan(recipe, Watching())
    with (
        LocalWorkers(planned.setup) as workers,
        pytest.raises(UserError, match="raise the tokens of the text generated from"),
    ):
        healing_windows(workers, recipe, None, Watching(), Shared())
