"""Published texts are read as their description says: here it is read by hand, with the tokenizer
and slices alone."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from desk import Desk
from hub_of_texts import text_hub
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fusegpt_ray.cli import main
from fusegpt_ray.errors import UserError
from fusegpt_ray.recipe.recipe import Recipe
from fusegpt_ray.recipe.sections import Evaluation
from fusegpt_ray.recipe.specs import PUBLISHED_SPECS
from fusegpt_ray.text.protocol import described
from fusegpt_ray.text.published import published_windows

EXAMPLE = Path(__file__).parents[2] / "examples/tiny-llama"
KEY = "evaluation.wiki.data"
Capture = pytest.CaptureFixture[str]


def wikitext_rows() -> list[str]:
    """As the hub has them: headings and paragraphs end in a space and a line end, and the lines
    between are empty."""
    draw = random.Random(0)
    rows = []
    while len(rows) < 4358:
        words = " ".join(f"w{draw.randrange(3, 101)}" for _ in range(draw.randrange(1, 5)))
        rows += ["", f" = {words} = \n", "", f" {words} <unk> {words} \n"]
    return rows[:4358]


def c4_rows(count: int = 1300) -> list[str]:
    draw = random.Random(1)
    return [
        "\n".join(f"w{draw.randrange(3, 101)} w{draw.randrange(3, 101)}." for _ in range(3))
        for _ in range(count)
    ]


def parquet(rows: list[str], path: Path) -> Path:
    pq.write_table(pa.table({"text": rows}), path)
    return path


def json_lines(rows: list[str], path: Path) -> Path:
    lines = "".join(json.dumps({"text": row, "url": "x"}) + "\n" for row in rows)
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    return path


def original(rows: list[str], path: Path) -> Path:
    """As the authors' archive has it: blank lines are a space."""
    path.write_text("".join(row or " \n" for row in rows))
    return path


def tokenizer_of(tmp_path: Path, begins: bool) -> PreTrainedTokenizerFast:
    """One that sees spaces and line ends; `begins`: and puts a token before a text."""
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE)
    if not begins:
        return tokenizer
    inner = Tokenizer.from_file(str(EXAMPLE / "tokenizer.json"))
    token, number = tokenizer.bos_token, tokenizer.bos_token_id
    inner.post_processor = processors.TemplateProcessing(
        f"{token} $A", special_tokens=[(token, number)]
    )
    PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=token).save_pretrained(tmp_path / "t")
    return AutoTokenizer.from_pretrained(tmp_path / "t")


def read(text: Evaluation, tokenizer: Any, length: int) -> tuple[list[list[int]], dict[str, Any]]:
    found = published_windows(text, tokenizer, length, None, KEY)
    return found.tokens_WT.tolist(), found.protocol


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize(
    ("name", "write"),
    [("test.parquet", parquet), ("test.jsonl", json_lines), ("wiki.test.raw", original)],
)
def test_wikitext2_is_what_its_description_says(
    name: str, write: Callable[[list[str], Path], Path], begins: bool, tmp_path: Path
) -> None:
    rows, tokenizer = wikitext_rows(), tokenizer_of(tmp_path, begins)
    data = f"wikitext2={write(rows, tmp_path / name)}"
    ids = tokenizer("\n\n".join(rows))["input_ids"]
    expected = [ids[at : at + 100] for at in range(0, len(ids) - 99, 100)]
    assert len(ids) % 100 and len(expected) > 100, "the last window is incomplete"
    assert (expected[0][0] == tokenizer.bos_token_id) == begins
    found, protocol = read(Evaluation(data=data), tokenizer, 100)
    assert found == expected
    token = "with a beginning-of-sequence token before the whole text alone"
    token = token if begins else "without a beginning-of-sequence token"
    assert described(protocol) == f"{len(expected)} windows of 100 tokens of {data}, {token}"
    assert read(Evaluation(data=data, windows=3), tokenizer, 100)[0] == expected[:3]


@pytest.mark.parametrize("name", ["val.json.gz", "val.jsonl"])
@pytest.mark.parametrize("begins", [False, True])
def test_c4_is_what_its_description_says(name: str, begins: bool, tmp_path: Path) -> None:
    rows, tokenizer = c4_rows(), tokenizer_of(tmp_path, begins)
    data = f"c4={json_lines(rows, tmp_path / name)}"
    all_ids = tokenizer(" ".join(rows[:1100]))["input_ids"]
    for length in (20, 4000):
        ids = all_ids[: 256 * length]
        expected = [ids[at : at + length] for at in range(0, len(ids) - length + 1, length)]
        assert (len(expected) == 256) == (length == 20), "the limit holds for one, not the other"
        assert read(Evaluation(data=data), tokenizer, length)[0] == expected
    assert len(read(Evaluation(data=data, windows=300), tokenizer, 20)[0]) == 300


def test_a_recipe_that_says_bos_has_it_in_each_window(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path, begins=True)
    text = Evaluation(data=f"c4={json_lines(c4_rows(), tmp_path / 'val.jsonl')}", bos="always")
    found = published_windows(text, tokenizer, 20, tokenizer.bos_token_id, KEY)
    ids = tokenizer(" ".join(c4_rows()[:1100]), add_special_tokens=False)["input_ids"]
    expected = [[tokenizer.bos_token_id, *ids[at : at + 19]] for at in range(0, 19 * 256, 19)]
    assert found.tokens_WT.tolist() == expected
    assert found.bos and "bos_once" not in found.protocol


# --- what is not the published text ---


@pytest.mark.parametrize(
    ("name", "rows", "problem"),
    [
        ("wikitext2", wikitext_rows()[:-1], "has 4357 rows"),
        ("wikitext2", [*wikitext_rows(), ""], "has more than 4358 rows"),
        ("c4", c4_rows(1099), "has 1099 rows"),
    ],
)
def test_another_text_does_not_get_its_name(
    name: str, rows: list[str], problem: str, tmp_path: Path
) -> None:
    data = f"{name}={json_lines(rows, tmp_path / 'rows.jsonl')}"
    with pytest.raises(UserError, match=problem) as caught:
        read(Evaluation(data=data), tokenizer_of(tmp_path, False), 20)
    assert (caught.value.key, caught.value.value) == (KEY, data)
    assert PUBLISHED_SPECS[name].file in caught.value.fix


def test_c4_as_plain_text_has_no_documents(tmp_path: Path) -> None:
    (tmp_path / "c4.txt").write_text("\n".join(c4_rows()))
    with pytest.raises(UserError, match="does not tell one document from another"):
        read(Evaluation(data=f"c4={tmp_path}/c4.txt"), tokenizer_of(tmp_path, False), 20)


def test_a_name_that_also_lies_here_is_refused(desk: Desk, capsys: Capture) -> None:
    (desk.folder / "c4").mkdir()
    assert main(["evaluate", str(desk.model), "--data", "c4", "--length", "12"]) == 2
    (told,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert "--data = 'c4': both a published text and something that lies here" in told
    assert "c4=FILE" in told and "./c4" in told


def test_without_a_network_a_copy_is_asked_for(desk: Desk, capsys: Capture) -> None:
    assert main(["evaluate", str(desk.model), "--data", "wikitext2", "--length", "12"]) == 2
    told = capsys.readouterr().err
    assert "--data = 'wikitext2': the hub does not give wikitext-2-raw-v1/test-00000" in told
    assert "wikitext2=FILE" in told


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("config", "x"),
        ("split", "train"),
        ("revision", "main"),
        ("column", "body"),
        ("pack", False),
        ("images", True),
    ],
)
def test_keys_that_papers_do_not_change_are_refused(key: str, value: Any, desk: Desk) -> None:
    with pytest.raises(UserError, match="read as papers do") as caught:
        Recipe.parse(desk.recipe(evaluation={"w": {"data": "c4=f.jsonl", key: value}}))
    assert caught.value.key == f"evaluation.w.{key}"


def test_the_copy_has_a_name_and_no_secret(desk: Desk) -> None:
    for data, problem in (
        ("wikitext2=", "names no copy"),
        ("c4=s3://KEY@bucket/c4.jsonl", "a URI with a user name"),
    ):
        with pytest.raises(UserError, match=problem) as caught:
            Recipe.parse(desk.recipe(evaluation={"w": {"data": data}}))
        assert caught.value.key == "evaluation.w.data" and "KEY" not in str(caught.value)


def test_windows_are_of_2048_tokens_unless_it_says_otherwise(desk: Desk, capsys: Capture) -> None:
    wiki = parquet(wikitext_rows(), desk.folder / "test.parquet")
    assert main(["evaluate", str(desk.model), "--data", f"wikitext2={wiki}"]) == 2
    told = capsys.readouterr().err
    assert "--length = 2048: longer than the model's 64 positions" in told
    assert main(["compress", desk.write(evaluation={"w": {"data": f"wikitext2={wiki}"}})]) == 2
    assert "evaluation.w.length = 2048: longer than" in capsys.readouterr().err


# --- the whole way ---


def test_a_recipe_and_the_command_measure_the_same(desk: Desk, capsys: Capture) -> None:
    wiki = parquet(wikitext_rows(), desk.folder / "test.parquet")
    text = {"data": f"wikitext2={wiki}", "length": 30, "windows": 9}
    recipe = desk.write(method="mi", sparsity=0.2, evaluation={"wiki": text})
    assert main(["validate", recipe]) == 0
    assert main(["compress", recipe]) == 0
    manifest = json.loads((desk.out / "demo-p20/fusegpt.json").read_text())
    capsys.readouterr()
    options = ["--data", text["data"], "--length", "30", "--windows", "9", "--json"]
    assert main(["evaluate", str(desk.model), *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["perplexity"] == manifest["perplexity"]["wiki"]["dense"]
    assert manifest["perplexity"]["wiki"]["data"] == found["data"] == text["data"]


def test_a_missing_copy_is_among_all_mistakes(desk: Desk, capsys: Capture) -> None:
    recipe = desk.write(evaluation={"w": {"data": "c4=no.jsonl", "length": 12}})
    assert main(["validate", recipe]) == 2
    assert "evaluation.w.data = 'no.jsonl': no such file" in capsys.readouterr().err


def test_from_the_hub_and_then_from_its_cache(desk: Desk) -> None:
    spec = PUBLISHED_SPECS["wikitext2"]
    file = parquet(wikitext_rows(), desk.folder / "test.parquet")
    text = ["--length", "30", "--windows", "9"]
    with text_hub(spec, file, desk.folder / "home") as hub:
        copy = hub.evaluate("model", "--data", f"wikitext2={file}", *text)
        online = hub.evaluate("model", "--data", "wikitext2", *text)
        assert [path.rsplit("/", 1)[-1] for path in hub.downloads] == [
            "test-00000-of-00001.parquet"
        ]
    offline = hub.evaluate("model", "--data", "wikitext2", *text, offline="1")
    assert online["perplexity"] == offline["perplexity"] == copy["perplexity"]
    assert online["data"] == "wikitext2"
