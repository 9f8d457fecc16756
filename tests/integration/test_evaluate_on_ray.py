"""Models measured side by side on Ray have the bits that one process gives them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fusegpt_ray.cli import main

pytestmark = pytest.mark.integration


def test_any_number_of_replicas_gives_the_same_output(
    material, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": line} for line in material.heldout.read_text().split()][:1100]
    rows += [{"text": "ba"}] * (1100 - len(rows))
    copy = tmp_path / "c4.jsonl"
    copy.write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = ["--data", str(material.heldout), "--data", f"c4={copy}", "--length", "24"]
    models = [str(material.model), str(material.model_bf16)]
    printed = []
    for engine in (["local"], ["ray", "--replicas", "1"], ["ray", "--replicas", "2"]):
        assert main(["evaluate", *models, *texts, "--engine", *engine, "--json", "--quiet"]) == 0
        printed.append(capsys.readouterr().out)
    results = json.loads(printed[0])["results"]
    assert len(results) == 4 and all(row["windows"] > 5 for row in results)
    assert printed[0] == printed[1] == printed[2]
