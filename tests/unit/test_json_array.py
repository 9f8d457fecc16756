"""An array of JSON read item by item gives what the library makes of it as a whole."""

from __future__ import annotations

import io
import json
import random
import tracemalloc
from typing import Any

import pytest

from fusegpt_ray.text import json_array
from fusegpt_ray.text.json_array import array_items

MOST = 1000
ARRAYS = [
    "[]",
    " [ \n ] \n",
    "[1]",
    "[12345, -1.5e3, true, null]",
    '["a, ]b", "\\"", "é – 漢"]',
    '[{"a": [1, 2, {"b": []}]}, {}, [], {"c": "]"}]\n\n',
]
WRONG = [
    "[",
    "[1",
    "[1,",
    "[1,]",
    "[,1]",
    "[1 2]",
    "[1] 2",
    '["a]',
    "[{]}",
    "[nul]",
    '[{"a" 1}]',
]


def found(text: str) -> list[Any]:
    file = io.StringIO(text.lstrip())
    return list(array_items(file.read(json_array.CHUNK), file.read, MOST))


@pytest.mark.parametrize("chunk", [1, 2, 7, 1 << 20])
def test_whatever_is_read_at_once(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_array, "CHUNK", chunk)
    draw = random.Random(0)
    drawn = [[{"n": draw.random(), "s": "x" * draw.randrange(30)} for _ in range(20)]]
    for text in (*ARRAYS, *(json.dumps(one, indent=draw.randrange(3)) for one in drawn)):
        assert found(text) == json.loads(text)
    for text in WRONG:
        with pytest.raises(json.JSONDecodeError):
            json.loads(text)
        with pytest.raises(ValueError, match=r"is not JSON|was expected|more behind"):
            found(text)


def test_an_item_may_have_so_many_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_array, "CHUNK", 100)
    assert found(json.dumps(["a" * (MOST - 2)] * 3)) == ["a" * (MOST - 2)] * 3
    with pytest.raises(ValueError, match="item 2 is not JSON, or has more than 1000 characters"):
        found(json.dumps(["a", "b" * 3 * MOST]))


def test_only_an_item_is_held() -> None:
    """Of 30 MB little more than what is read at once."""
    item = json.dumps({"text": "a" * 1000}) + ","
    text = io.TextIOWrapper(io.BytesIO(f"[{item * 30_000}{{}}]".encode()))
    tracemalloc.start()
    number = sum(1 for _ in array_items(text.read(1), text.read, 10_000))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert number == 30_001
    assert peak < 8 * json_array.CHUNK
