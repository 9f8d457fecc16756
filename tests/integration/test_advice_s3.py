"""On S3, a run that failed before its first round leaves nothing that is in the way of another."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from fusegpt_ray.cli import main
from fusegpt_ray.terminal.display import Display

pytestmark = pytest.mark.integration


class Failing(Display):
    """Fails where this stage begins."""

    at = ""

    def stage(self, text: str, total: int | None = None) -> None:
        super().stage(text, total)
        if text.startswith(self.at):
            raise RuntimeError("something broke")


@pytest.mark.parametrize("stage", ["evaluating the dense model", "round 1: fusing"])
def test_another_recipe_may_follow(
    stage: str,
    s3,
    bucket: str,
    material,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def command(**changes: object) -> list[str]:
        recipe = material.recipe(f"s3://{bucket}/out", sparsity=0.125, **changes)
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        return ["compress", str(tmp_path / "recipe.yaml")]

    with monkeypatch.context() as patch:
        patch.setattr("fusegpt_ray.pipeline.Display", Failing)
        patch.setattr(Failing, "at", stage)
        assert main(command()) == 1
    saved = "out/tiny.run/scores-001.json" in s3.objects(bucket)
    assert saved == ("goes on" in capsys.readouterr().err) == (stage == "round 1: fusing")
    assert saved or not s3.objects(bucket)
    assert main(command(seed=1)) == 0
    assert {key.split("/")[1] for key in s3.objects(bucket)} == {"tiny-p12.5"}
