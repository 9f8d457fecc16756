"""The manifest and the model card tell the truth."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from models import DEPTH, open_stack
from published_models import FACTS, KEPT, dressed, load, published, same_logits, shortened

from fusegpt_ray.model.source import MANIFEST, Source
from fusegpt_ray.publishing.cardheader import header
from fusegpt_ray.publishing.publish import Published, publish


def test_the_manifest_tells_the_truth_about_every_file(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = dressed(checkpoint("llama"), tmp_path / "source")
    result = published(source, tmp_path / "out", shard_bytes=25_000)
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert result == Published(str(tmp_path / "out"), manifest)
    there = {
        file.name: file.read_bytes()
        for file in (tmp_path / "out").iterdir()
        if file.name != MANIFEST
    }
    assert manifest["files"] == {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in there.items()
    }
    assert {key: manifest[key] for key in FACTS} == FACTS
    assert (manifest["dense_blocks"], manifest["kept"]) == (DEPTH, KEPT)
    assert manifest["source"] == {"name": str(source), "revision": None, "on_hub": False}
    assert {name: manifest["versions"][name] for name in ("torch", "transformers")} == {
        name: version(name) for name in ("torch", "transformers")
    }


def card_of(folder: Path) -> tuple[dict[str, Any], str]:
    """The card's front matter and the rest."""
    _, front, body = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), body


def test_the_card_tells_the_truth(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    published(checkpoint("llama"), tmp_path / "demo-p40")
    front, body = card_of(tmp_path / "demo-p40")
    assert front["library_name"] == "transformers" and "base_model" not in front
    assert "# demo-p40\n" in body
    assert (
        f"{checkpoint('llama').name} with 2 of its 5 decoder blocks removed: "
        "blocks with the lowest Macro Influence dropped" in body
    )
    assert "in order (numbers in the dense model): 3, 0." in body
    assert "| held-out (9 tokens a window) | 10.50 | 12.25 | 11.75 |" in body
    (recipe,) = re.findall(r"```json\n(.*?)```", body, re.DOTALL)
    assert json.loads(recipe) == FACTS["recipe"]


@pytest.mark.parametrize("name", ["llama", "llava"])
def test_the_cards_python_runs(
    name: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = dressed(checkpoint(name), tmp_path / "source")
    published(source, tmp_path / "out")
    code, quantising = re.findall(
        r"```python\n(.*?)```", (tmp_path / "out/README.md").read_text(), re.DOTALL
    )
    names: dict[str, Any] = {}
    exec(code.replace("<this folder>", str(tmp_path / "out")), names)
    assert same_logits(names["model"].eval(), load(tmp_path / "out"))
    compile(quantising, "README.md", "exec")  # llm-compressor is not installed here
    assert set(re.findall(r"\b(model|tokenizer)\.", quantising)) <= names.keys()


def test_a_hub_model_is_named_as_the_base(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    dense = open_stack(checkpoint("llama"))
    source = Source("some-lab/tiny", "v1.0", str(checkpoint("llama")))
    publish(str(tmp_path / "out"), shortened(dense), dense, source, 10**9, FACTS)
    front, body = card_of(tmp_path / "out")
    assert front["base_model"] == "some-lab/tiny" and "some-lab/tiny (revision v1.0) with 2" in body


def test_a_local_folder_is_not_taken_for_a_hub_model(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(checkpoint("llama"), tmp_path / "models/llama")
    monkeypatch.chdir(tmp_path)
    dense = open_stack(Path("models/llama"))
    publish("out", shortened(dense), dense, Source.find("models/llama", None), 10**9, FACTS)
    assert "base_model" not in card_of(Path("out"))[0]


def card_with(
    said: str, files: list[str], source: Path, out: Path, revision: str | None = None
) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """The card, and the manifest, of a model whose source has this card and these files; a hub's
    where a revision is given."""
    shutil.copytree(source, out / "source")
    if said:
        (out / "source/README.md").write_text(said)
    for name in files:
        (out / "source" / name).write_text("do as you like")
    dense = open_stack(out / "source")
    where = Source("a-lab/base", revision, str(out / "source")) if revision else None
    where = where or Source.find(str(out / "source"), None)
    found = publish(str(out / "made"), shortened(dense), dense, where, 10**9, FACTS)
    return *card_of(out / "made"), found.manifest


OTHER = {"license": "other", "license_name": "tiny", "license_link": "LICENSE"}
LICENCES: dict[str, tuple[str, list[str], str | None, dict[str, Any], str]] = {
    "named": ("---\nlicense: mit\n---\n", [], None, {"license": "mit"}, ": mit."),
    "its own": (
        f"---\n{yaml.safe_dump(OTHER)}---\n",
        ["LICENSE"],
        None,
        OTHER,
        ": [tiny](LICENSE).",
    ),
    "a link that is left": (
        f"---\n{yaml.safe_dump(OTHER)}---\n",
        [],
        "v2",
        OTHER | {"license_link": "https://huggingface.co/a-lab/base/blob/v2/LICENSE"},
        "a-lab/base: [tiny](https://huggingface.co/a-lab/base/blob/v2/LICENSE).",
    ),
    "a file alone": (
        "# no header",
        ["LICENSE.txt"],
        None,
        {"license": "other", "license_link": "LICENSE.txt"},
        ": [other](LICENSE.txt).",
    ),
    "several": (
        "---\nlicense: [mit, gpl]\n---\n",
        [],
        None,
        {"license": ["mit", "gpl"]},
        "mit, gpl",
    ),
    "unknown": ("", [], None, {}, "came without word of its licence"),
    "nonsense": ("---\nlicense: {a: 1}\n---\n", [], None, {}, "came without word"),
    "an odd number": ("---\nlicense: !!int ''\n---\n", [], None, {}, "came without word"),
    "an odd time": ("---\nlicense: !!timestamp x\n---\n", [], None, {}, "came without word"),
    "an odd value": ("---\nlicense: !!bool maybe\n---\n", [], None, {}, "came without word"),
    "no YAML": ("---\nlicense: [\n---\n", [], None, {}, "came without word"),
}


@pytest.mark.parametrize("name", LICENCES)
def test_the_sources_licence_goes_along(
    name: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    top, files, revision, said, told = LICENCES[name]
    front, body, manifest = card_with(top, files, checkpoint("llama"), tmp_path, revision)
    assert {key: front[key] for key in OTHER.keys() & front.keys()} == said
    assert manifest.get("license", {}) == said
    assert told in body.split("## Licence")[1]


def test_the_hub_can_read_the_card(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Its own library reads the results back as they were measured."""
    published(checkpoint("llama"), tmp_path / "demo-p40")
    card = ModelCard.load(tmp_path / "demo-p40/README.md").data
    assert card.model_name == "demo-p40" and card.pipeline_tag == "text-generation"
    (result,) = card.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value, result.metric_args) == (
        "held-out",
        "perplexity",
        11.75,
        {"length": 9},
    )
    assert result.dataset_type == "held-out", "no path is told"


def test_datasets_of_the_hub_are_named() -> None:
    wiki = {"data": "Salesforce/wikitext", "config": "wikitext-2-raw-v1", "revision": None}
    recipe = {
        "calibration": {"data": [wiki, {"data": "own/text.jsonl"}, {"generate": True}]},
        "heal": {"data": "allenai/c4"},
        "evaluation": {"wiki": wiki | {"split": "test"}},
    }
    manifest = FACTS | {
        "source": {"name": "a/b", "on_hub": True},
        "recipe": recipe,
        "perplexity": {"wiki": {"dense": 5.0, "fused": 6.0, "length": 9, "bos": True}},
    }
    front = yaml.safe_load(header("x", manifest, "AutoModelForCausalLM").strip("-"))
    assert front["datasets"] == ["Salesforce/wikitext", "allenai/c4"]
    (result,) = front["model-index"][0]["results"]
    assert result["dataset"] == {
        "name": "wiki",
        "type": "Salesforce/wikitext",
        "config": "wikitext-2-raw-v1",
        "split": "test",
    }
