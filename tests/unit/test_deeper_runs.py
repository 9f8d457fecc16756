"""Whole runs that make a model deeper: what they publish and say, how they go on, and what they
refuse.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
import yaml
from desk import LENGTH, Desk, text_of
from experts import save_split
from mistakes import Bad, check, table
from models import COMMON, load_model
from safetensors.torch import load_file
from stopped_runs import Watching, contents, published, recipe, run_folder
from words import SPECIAL, add_tokenizer

from fusegpt_ray.cli import main
from fusegpt_ray.comparison.cells import Comparison
from fusegpt_ray.errors import UserError
from fusegpt_ray.pipeline import compress
from fusegpt_ray.planning.plan import plan
from fusegpt_ray.publishing.publish import Published
from fusegpt_ray.terminal.display import Display

HEAL: dict[str, Any] = {
    "tokens": 8 * LENGTH,
    "batch": 4,
    "held_out": 4,
    "looks": 2,
    "train": "all",
    "learning_rate": 1e-3,
}
TLI: dict[str, Any] = {"sparsity": [], "method": "tli", "every": 2}
DUS: dict[str, Any] = {"sparsity": [], "method": "dus", "depth": "+40%"}


def changes(desk: Desk, method: dict[str, Any]) -> dict[str, Any]:
    cluster = {"engine": "local", "checkpoint_minutes": 0}
    held_out = {"heldout": {"data": str(desk.heldout)}}
    pattern = desk.folder / "pattern.txt"  # of random text, what is held out could not be learned
    pattern.write_text(text_of(len(SPECIAL) + torch.arange(20 * LENGTH) % 7))
    heal = HEAL | {"data": str(pattern)}
    return {"heal": heal, "evaluation": held_out, "cluster": cluster, **method}


class Stopped(Watching):
    """The user presses Ctrl-C where a stage begins so, or after the first part of healing."""

    def __init__(self, at: str) -> None:
        super().__init__()
        self.at, self.parts = at, list[int]()

    def stage(self, text: str, total: int | None = None) -> None:
        super().stage(text, total)
        if self.at and text.startswith(self.at):
            raise KeyboardInterrupt

    def epoch(self, number: int, *rest: Any, **more: Any) -> None:
        super().epoch(number, *rest, **more)
        self.parts.append(number)
        if self.at == "a part" and number == 1:
            raise KeyboardInterrupt


@pytest.fixture(name="runs", scope="module")
def _runs(
    checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Desk, Published, Watching]]:
    found = {}
    for method in (TLI, DUS):
        name = str(method["method"])
        desk, show = Desk.make(tmp_path_factory.mktemp(name), checkpoint("llama")), Watching()
        output = desk.recipe()["output"] | {"report": True}
        (one,) = compress(recipe(desk, **changes(desk, method), output=output), show)
        assert not run_folder(desk).exists()
        found[name] = desk, one, show
    return found


def test_the_manifest_tells_what_was_put_in_and_what_came_of_it(
    runs: dict[str, tuple[Desk, Published, Watching]],
) -> None:
    copies = {"tli": [(1, 1), (3, 3)], "dus": [(3, 2), (3, 3)]}
    kinds = {"tli": [0, 1, 1, 2, 3, 3, 4], "dus": [0, 1, 2, 3, 2, 3, 4]}
    for name, (desk, one, show) in runs.items():
        told = one.manifest
        assert one.uri == str(desk.out / "demo-d7")
        assert [(item["after"], item["like"]) for item in told["inserted"]] == copies[name]
        assert told["kept"] == kinds[name] and told["dense_blocks"] == 5
        assert told["removed"] == [] and told["sparsity"] is None and len(told["rounds"]) == 1
        row = told["perplexity"]["heldout"]
        assert [key for key in row if isinstance(row[key], float)] == [
            "dense",
            "inserted",
            "healed",
        ]
        # To the last bit, and for the other it is not.
        assert (row["inserted"] == row["dense"]) == (name == "tli")
        assert row["healed"] != row["inserted"]
        healing = told["healing"]
        assert min(healing["held_out"][1:]) < healing["held_out"][0]
        assert show.rounds == [1] and "5 blocks, 2 to add" in "\n".join(show.said)
        model = load_model(Path(one.uri))
        assert model.config.num_hidden_layers == 7


def test_new_blocks_learn(runs: dict[str, tuple[Desk, Published, Watching]]) -> None:
    _, one, _ = runs["tli"]
    tensors = load_file(Path(one.uri) / "model.safetensors")
    for number in (2, 5):
        assert tensors[f"model.layers.{number}.self_attn.o_proj.weight"].any()
        assert tensors[f"model.layers.{number}.mlp.down_proj.weight"].any()


def test_card_report_and_status_tell_of_a_deeper_model(
    runs: dict[str, tuple[Desk, Published, Watching]], capsys: pytest.CaptureFixture[str]
) -> None:
    for name, (desk, one, _) in runs.items():
        card = (Path(one.uri) / "README.md").read_text()
        assert "with 2 decoder blocks added to its 5: " in card and "removed" not in card
        assert "trained together on the next tokens of text" in card
        assert "with more layers" in card and "- depth-up-scaling" in card
        assert "| perplexity on | dense | inserted | this model |" in card
        behind = "of 1 behind 1, 3 behind 3." if name == "tli" else "of 2 behind 3, 3 behind 3."
        assert behind in card
        page = (Path(one.uri) / "report.html").read_text()
        assert "with 2 blocks added; published" in page and "blocks</dt><dd>5 → 7</dd>" in page
        assert '<th scope="col">copy of block</th>' in page
        assert "cross-entropy of the next token" in page
        assert main(["status", str(desk.out)]) == 0
        assert "7, 5 before" in capsys.readouterr().out
        assert main(["verify", one.uri]) == 0
        capsys.readouterr()


@pytest.mark.parametrize("method", [TLI, DUS], ids=["tli", "dus"])
@pytest.mark.parametrize(
    ("at", "left"), [("healing", [1, 2]), ("a part", [2]), ("evaluating and publishing", [])]
)
def test_a_run_that_is_stopped_ends_with_the_same_bytes(
    at: str,
    left: list[int],
    method: dict[str, Any],
    desk: Desk,
    runs: dict[str, tuple[Desk, Published, Watching]],
) -> None:
    with pytest.raises(KeyboardInterrupt):
        compress(recipe(desk, **changes(desk, method)), Stopped(at))
    assert "round-001.json" in contents(run_folder(desk))
    again = Stopped("")
    compress(recipe(desk, **changes(desk, method)), again)
    assert again.rounds == [] and again.parts == left
    assert published(desk) == published(runs[method["method"]][0])


def test_a_lost_file_of_zeros_is_written_again(
    desk: Desk, runs: dict[str, tuple[Desk, Published, Watching]]
) -> None:
    asked = recipe(desk, **changes(desk, TLI))
    with pytest.raises(KeyboardInterrupt):
        compress(asked, Stopped("healing"))
    (file,) = run_folder(desk).glob("blocks/round-001/zeros-*.safetensors")
    file.unlink()
    again = Stopped("")
    compress(asked, again)
    assert again.rounds == [1] and f"WARNING: {file} is missing" in "\n".join(again.said)
    assert published(desk) == published(runs["tli"][0])


def test_without_healing_the_published_model_is_the_old_one(desk: Desk) -> None:
    sections = {key: value for key, value in changes(desk, TLI).items() if key != "heal"}
    (one,) = compress(recipe(desk, **sections), Watching())
    row = one.manifest["perplexity"]["heldout"]
    assert row["inserted"] == row["dense"] and "healed" not in row
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        logits = [load_model(place)(ids).logits for place in (Path(one.uri), desk.model)]
    assert torch.equal(*logits)


# --- before the work ---


def test_a_plan_tells_what_it_will_cost(
    desk: Desk, weight_reads: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    asked = desk.write(**changes(desk, TLI))
    assert main(["plan", asked, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    (target,) = told["targets"]
    assert (target["removes"], target["adds"], target["blocks"]) == (0, 2, 7)
    (healing,) = told["stages"]
    # 8 windows there and back and 4 held-out ones three times, through 7 blocks; no teacher.
    assert healing["stage"] == "healing" and healing["block_forwards"] == 7 * (3 * 8 + 3 * 4)
    assert main(["plan", asked]) == 0
    assert "demo-d7: 2 blocks are added, which makes 7 blocks, " in capsys.readouterr().out
    assert weight_reads == []


def test_what_is_published_is_as_large_as_was_planned(
    runs: dict[str, tuple[Desk, Published, Watching]], desk: Desk
) -> None:
    for name, method in (("tli", TLI), ("dus", DUS)):
        planned = plan(recipe(desk, **changes(desk, method)), Display(), looks=True)
        (size,) = planned.cost.published_bytes.values()
        tensors = load_file(Path(runs[name][1].uri) / "model.safetensors").values()
        assert size == sum(value.nbytes for value in tensors)


def test_a_comparison_refuses_methods_without_a_sparsity(desk: Desk) -> None:
    data = {**desk.recipe(), "compare": {"methods": ["mi", {"method": "tli", "depth": "+25%"}]}}
    with pytest.raises(UserError, match="a comparison's columns are sparsities"):
        Comparison.parse(data)


def asked(desk: Desk, **sections: Any) -> list[str]:
    """A recipe without `sparsity`, unless it is given."""
    data = desk.recipe(**sections)
    if "sparsity" not in sections:
        del data["sparsity"]
    file = desk.folder / "deeper.yaml"
    file.write_text(yaml.safe_dump(data))
    return ["compress", str(file)]


def jamba(desk: Desk) -> list[str]:
    save_split("jamba", desk.folder / "jamba")
    add_tokenizer(desk.folder / "jamba")
    model = {"source": str(desk.folder / "jamba")}
    return asked(desk, method="tli", every=2, model=model)


def with_norms_behind(desk: Desk) -> list[str]:
    folder = desk.folder / "opt"
    sizes = {"ffn_dim": 48, "word_embed_proj_dim": 32, "do_layer_norm_before": False}
    tf.OPTForCausalLM(tf.OPTConfig(**COMMON, **sizes)).save_pretrained(folder)
    add_tokenizer(folder)
    return asked(desk, method="tli", depth="+40%", model={"source": str(folder)})


MISTAKES = [
    Bad(
        "K above the depth",
        lambda desk: asked(desk, method="tli", every=6),
        "every",
        "6",
        "the model has 5 blocks, so none",
        "at most 5",
    ),
    Bad(
        "nothing added",
        lambda desk: asked(desk, method="dus", depth=0),
        "depth",
        "0",
        "not above 0",
        r"\+25%",
    ),
    Bad(
        "fewer than nothing",
        lambda desk: asked(desk, method="dus", depth="-25%"),
        "depth",
        "-25%",
        "no share",
        r"\+25%",
    ),
    Bad(
        "three times as deep",
        lambda desk: asked(desk, method="tli", depth="+200%"),
        "depth",
        "2.0",
        "at most twice as deep",
        r"\+25%",
    ),
    Bad(
        "every block but none",
        lambda desk: asked(desk, method="tli", every=0),
        "every",
        "0",
        "not 1 or more",
        "give a whole number of at least 1",
    ),
    Bad(
        "a sparsity as well",
        lambda desk: asked(desk, method="tli", every=2, sparsity=0.25),
        "sparsity",
        "0.25",
        "removes no blocks",
        "give depth",
    ),
    Bad(
        "a depth of a shallower model",
        lambda desk: asked(desk, method="mi", depth="+25%"),
        "depth",
        "0.25",
        "makes models shallower",
        "tli",
    ),
    Bad(
        "a config that cannot express it",
        jamba,
        "model.source",
        "Jamba",
        r"block \d would become block \d",
        "the same at every depth",
    ),
    Bad(
        "blocks that cannot begin as nothing",
        with_norms_behind,
        "model.source",
        "OPTForCausalLM",
        "does not hand on its states",
        "use method: dus",
    ),
]


@table(MISTAKES)
def test_mistakes_are_found_before_weights_are_read(
    bad: Bad, desk: Desk, weight_reads: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    check(bad, desk, weight_reads, capsys)
