"""The benchmarks run, at sizes that take seconds; what they measure is not tested."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import end_to_end
import publishing
import pytest
import reading
import scale


def test_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reading, "SHARD", 50_000)
    out = tmp_path / "out.json"
    sizes = ["--blocks", "2", "--hidden", "64", "--intermediate", "128", "--repeats", "2"]
    assert reading.main([*sizes, "--cold", "--folder", str(tmp_path), "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["bytes"] == 2 * 2 * (4 * 64 * 64 + 3 * 64 * 128 + 64)
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in found["seconds"].values())
    text = capsys.readouterr().out
    assert "in 4 files" in text and all(f"| {way} |" in text for way in found["seconds"])
    assert list(tmp_path.iterdir()) == [out]


def test_saving_in_three_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--blocks", "2", "--hidden", "128", "--intermediate", "256", "--turns", "1"]
    shards = ["--shard-gb", "0.0002", "5"]
    out = tmp_path / "out.json"
    assert publishing.main([*sizes, *shards, "--json", str(out)]) == 0
    assert "| 1 | 0.00 | now |" in capsys.readouterr().out
    many, one = json.loads(out.read_text())["rows"]
    assert many["shards"] > 1 == one["shards"] and many["bytes"] == one["bytes"] > 0
    assert many["seconds"].keys() == {"plain", "before", "now"}


def test_the_plain_way_and_ours_remove_the_same_and_learn_alike(material, tmp_path: Path) -> None:
    sizes = {"windows": 16, "length": 24, "epochs": 2, "rank": 4, "remove": 2}
    texts = ["--calibration", str(material.calibration), "--test", str(material.heldout)]
    command = [str(material.model), *texts, *(f"--{key}={value}" for key, value in sizes.items())]
    found = {}
    for way in ("plain", "paper"):
        (out := tmp_path / way).mkdir()
        assert end_to_end.main([*command, "--only", way, "--out", str(out)]) == 0
        found[way] = json.loads((out / "found.json").read_text())
        found[way]["perplexity"] = end_to_end.perplexity(
            found[way]["folder"], str(material.heldout), 32
        )
        assert all(seconds > 0 for seconds in found[way]["seconds"].values())
    assert found["plain"]["removed"] == found["paper"]["removed"]
    # They start from other random coefficients, and learn little in four steps at the paper's
    # rates.
    assert found["plain"]["perplexity"] == pytest.approx(found["paper"]["perplexity"], rel=1e-3)


@pytest.mark.parametrize("gpus", [1, 2, 4])
def test_a_family_lasts_as_long_as_its_schedule_says(gpus: int) -> None:
    kinds = [scale.Member.of(name, batch=8) for name in scale.MODELS[:2]]
    work = {n: [one.work(n) for one in kinds] for n in (1, 2)}
    assert all(
        half.shared < both.shared < 2 * half.shared  # starts and publishing are not divided
        for half, both in zip(work[2], work[1], strict=True)
    )

    def whole(n: int) -> list[float]:
        return [one.shared + one.publishing for one in work[n]]

    if gpus == 1:
        assert scale.hours(kinds, [1, 1], gpus) == pytest.approx(sum(whole(1)) / 3600)
    if gpus == 2:
        last = max(one.turns + one.publishing for one in work[1])
        assert scale.hours(kinds, [1, 1], gpus) == pytest.approx(last / 3600)
        # One that takes both has them for itself, whoever is first.
        assert scale.hours(kinds, [2, 2], gpus, "in turn") == pytest.approx(sum(whole(2)) / 3600)
        assert scale.hours(kinds, [2, 2], gpus) < sum(whole(2)) / 3600, "the first is put off"
        assert scale.hours(kinds, [1, 1], gpus, "beside") == pytest.approx(sum(whole(1)) / 3600)
    if gpus == 4:
        assert scale.hours(kinds, [1, 1], gpus) == pytest.approx(max(whole(1)) / 3600), "roomy"
    assert scale.best(kinds, 1, 8, gpus)[0] == min(
        scale.hours(kinds, each, gpus)
        for each in itertools.product([n for n in (1, 2, 4, 8) if n <= gpus], repeat=2)
    )
