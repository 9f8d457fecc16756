"""Cards and reports tell names, not where things lay on somebody's machine."""

from __future__ import annotations

import pytest

from fusegpt_ray.store.public import named, public, public_of_many


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("/home/me/texts/*.jsonl", "*.jsonl"), ("~/model/", "model"), ("../own.txt", "own.txt"),
        ("file:///data/own.txt", "own.txt"), ("C:\\texts\\own.txt", "own.txt"), ("/", "/"),
        ("a/b/c", "c"), ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-hf"),
        ("text generated from /home/me/own.txt", "text generated from own.txt"),
        ("Salesforce/wikitext (wikitext-2-raw-v1, test)",) * 2,
        ("/data/sets/own (plain, test)", "own (plain, test)"),
        ("gpt2", "gpt2"), ("s3://bucket/texts/own.txt", "s3://bucket/texts/own.txt"),
    ],
)  # fmt: skip
def test_of_a_local_path_the_last_part_is_told(place: str, told: str) -> None:
    assert named(place) == told


def test_all_places_of_a_manifest_are_found() -> None:
    text = {"data": "/home/me/a.txt", "config": "/not/a/place"}
    manifest = {
        "run": "/stays/as/it/is",
        "source": {"name": "/home/me/model", "revision": None},
        "calibration": {"windows": 4, "parts": [text, {"data": "c4"}]},
        "perplexity": {"data": {"data": "/home/me/b.txt", "dense": 2.0}},
        "recipe": {
            "calibration": {"data": [text, {"generate": "/home/me/c.txt"}]},
            "model": {"source": "/home/me/model"},
            "cluster": {"address": "ray://10.0.0.7:10001"},
            "output": {
                "uri": "/home/me/out",
                "samples": ["/a/prompt", {"image": "/home/d.png"}],
            },
        },
    }
    told = public(manifest)
    assert "home" not in str(told) and "10.0.0.7" not in str(told)
    assert told["run"] == "/stays/as/it/is" and told["source"]["name"] == "model"
    assert told["recipe"]["output"] == {"uri": "out", "samples": ["/a/prompt", {"image": "d.png"}]}
    assert told["calibration"]["parts"][0] == {"data": "a.txt", "config": "/not/a/place"}
    assert manifest["recipe"]["model"] == {"source": "/home/me/model"}, "it is left as it is"  # type: ignore[index]


def test_all_places_of_many_runs_are_found() -> None:
    """Sources may stand in lists, and each row has its model and its text."""
    result = {
        "name": "demo",
        "settings": {
            "model": {"source": "/home/me/model"},
            "output": {"uri": "/home/me/out"},
            "compare": {"models": ["/home/me/a", {"source": "/home/me/b", "name": "b"}]},
            "family": {"members": ["/home/me/c", {"model": {"source": "/home/me/d"}}]},
        },
        "rows": [{"model": "/home/me/a", "protocol": {"data": "/home/me/own.txt"}}],
    }
    told = public_of_many(result)
    assert "home" not in str(told)
    assert told["settings"]["compare"]["models"] == ["a", {"source": "b", "name": "b"}]
    assert told["rows"] == [{"model": "a", "protocol": {"data": "own.txt"}}]
