"""Under which licence the texts of a run stand: in its manifest and its model's card."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from desk import Desk
from hub_of_texts import text_hub
from stopped_runs import Watching, recipe

from fusegpt_ray.errors import UserError
from fusegpt_ray.pipeline import compress
from fusegpt_ray.recipe.recipe import Recipe
from fusegpt_ray.recipe.specs import PUBLISHED_SPECS
from fusegpt_ray.recipe.text_sections import Text
from fusegpt_ray.run.identity import settings
from fusegpt_ray.text.licence import licence

CARD = "---\nlicense:\n- cc-by-sa-3.0\n- gfdl\ntags: [words]\n---\n# Words\n"


def stating(desk: Desk, said: str | None) -> Recipe:
    section = desk.recipe()["calibration"]
    first = {"data": section["data"]} | ({"licence": said} if said else {})
    texts = [first, {"data": str(desk.heldout)}]
    output = {"uri": str(desk.out), "name": "demo", "report": False, "samples": []}
    table = desk.folder / "words"
    changes = {
        "calibration": section | {"data": texts},
        "evaluation": {"words": {"data": str(table), "split": "train"}},
        "output": output,
    }
    return recipe(desk, method="mi", sparsity=0.2, **changes)


def test_the_card_tells_it_of_each_text(desk: Desk) -> None:
    """As the recipe states it, as a folder's README.md does, or that it is not stated."""
    words = desk.folder / "words"
    words.mkdir()
    row = {"text": desk.heldout.read_text()}
    (words / "train.jsonl").write_text(json.dumps(row) + "\n")
    (words / "README.md").write_text(CARD)
    (made,) = compress(stating(desk, "CC0 1.0"), Watching())
    parts = made.manifest["calibration"]["parts"]
    assert [part["licence"] for part in parts] == ["CC0 1.0", "not stated"]
    assert made.manifest["perplexity"]["words"]["licence"] == "cc-by-sa-3.0, gfdl"
    card = (Path(made.uri) / "README.md").read_text()
    assert "(licence: CC0 1.0)" in card and "heldout.txt (licence: not stated)" in card
    assert f"of {words.name} (licence: cc-by-sa-3.0, gfdl), " in card


def test_it_shapes_nothing(desk: Desk) -> None:
    """So a run goes on where it is stated later."""
    assert settings(stating(desk, "MIT")) == settings(stating(desk, None))
    assert "licence" not in json.dumps(settings(stating(desk, "MIT")))
    texts = [{"data": "a.txt"}, {"data": "b.txt"}]
    with pytest.raises(UserError, match="stands beside a list"):
        recipe(desk, calibration={"data": texts, "licence": "MIT"})
    with pytest.raises(UserError, match="licence"):
        stating(desk, "two\nlines")


@pytest.mark.parametrize(
    ("card", "said"),
    [
        ("---\nlicense: mit\n---\n", "mit"),
        ("---\nlicense: other\nlicense_name: my-own\n---\n", "my-own"),
        ("---\nlicense: [1, {}]\n---\n", "not stated"),
        ("---\nlicense: !!timestamp x\n---\n", "not stated"),
        ("# no front matter\n", "not stated"),
    ],
)
def test_anybody_may_have_written_a_card(card: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(card)
    assert licence(Text(data=str(tmp_path))) == said


def test_the_card_of_a_dataset_is_fetched_from_the_hub(tmp_path: Path) -> None:
    """By the hub's own library, from a server that speaks its protocol; one without a card, or a
    hub that is not there, states nothing.
    """
    file = tmp_path / "card"
    file.write_text(CARD)
    named = {"repository": "some/words", "revision": "main", "file": "README.md"}
    spec = PUBLISHED_SPECS["wikitext2"]._replace(**named)
    code = (
        "from fusegpt_ray.text.licence import licence;"
        "from fusegpt_ray.recipe.text_sections import Text;"
        "print([licence(Text(data=name)) for name in ('some/words', 'some/others')])"
    )

    def asked(address: str) -> str:
        environment = os.environ | {
            "HF_ENDPOINT": address,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
        }
        command = [sys.executable, "-c", code]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=120, check=True
        )
        return done.stdout.strip()

    with text_hub(spec, file, tmp_path / "home") as hub:
        assert asked(hub.address) == "['cc-by-sa-3.0, gfdl', 'not stated']"
