"""Values of a recipe that are wrong, set by `--set`."""

from __future__ import annotations

import pytest
from desk import Desk
from mistakes import Bad, check, table


def overridden(
    setting: str, value: str, problem: str, fix: str = "", key: str = "", name: str = ""
) -> Bad:
    """`--set setting` on a good recipe."""

    def make(desk: Desk) -> list[str]:
        return ["compress", desk.write(), "--set", setting]

    key = key or setting.partition("=")[0]
    return Bad(name or setting, make, key, value, problem, fix or "give|write|use")


FRACTION = ("not between 0 and 1", "such as 0.25")
SETTINGS = [
    overridden("sparsity=0", "0.0", *FRACTION),
    overridden("sparsity=1", "1.0", *FRACTION),
    overridden("sparsity=1.5", "1.5", *FRACTION),
    overridden("sparsity=-1", "-1.0", *FRACTION),
    overridden("sparsity=.nan", "nan", *FRACTION),
    overridden("sparsity=0.7", "0.7", "leaves 1 of 5 blocks", "at most 0.60"),
    overridden("sparsity=[0.2, 0.9]", "0.9", "leaves 0 of 5 blocks", "at most 0.60"),
    overridden("sparsity=[0.2, 0.2]", "[0.2, 0.2]", "same name", "list each one once"),
    overridden("sparsity=[]", "[]", "there is none", "list each one once"),
    overridden("sparsity=some", "'some'", "not a number", key="sparsity"),
    overridden("metod=mi", "'mi'", "unknown key", "did you mean method"),
    overridden("fusion.los=batch_kl", "'batch_kl'", "unknown key", "did you mean fusion.loss"),
    overridden("model.nonsense=1", "1", "unknown key", "dtype"),
    overridden("calibration.lenght=8", "8", "unknown key", "did you mean calibration.length"),
    overridden("importance.metrics=bi", "'bi'", "unknown key", "did you mean importance.metric"),
    overridden("cluster.gpus=1", "1", "unknown key", "gpus_per_replica"),
    overridden("output.url=here", "'here'", "unknown key", "did you mean output.uri"),
    overridden(
        "evaluation.a={data: a.txt, colum: b}",
        "'b'",
        "unknown key",
        "did you mean evaluation.a.column",
        "evaluation.a.colum",
    ),
    overridden(
        "sparsity", "'sparsity'", "not of the form key=value", "--set fusion.epochs=5", key="--set"
    ),
    overridden("seed=[1", "'seed=[1'", "not YAML", "quote it", key="--set"),
    overridden("seed.of=3", "{'of'", "not a whole number", key="seed"),
    overridden("method=magic", "'magic'", "'mi', 'mi\\+linear', .*or 'dus'"),
    overridden("cluster.engine=spark", "'spark'", "'ray' or 'local'"),
    overridden("fusion.loss=mse", "'mse'", "'batch_kl' or 'normalized_mse'"),
    overridden("preset=default", "'default'", "'best', 'rounds' or 'paper'"),
    overridden("fusion.epochs=many", "'many'", "not a whole number", "of at least 1"),
    overridden("fusion.epochs=1.5", "1.5", "not a whole number", "of at least 1"),
    overridden("fusion.batch=1", "1", "not 2 or more", "of at least 2"),
    overridden("fusion=7", "7", "not a section"),
    overridden("fusion.learning_rate=-1", "-1", "not above 0"),
    overridden("fusion.learning_rate=.nan", "nan", "not above 0|finite"),
    overridden("fusion.learning_rate=.inf", "inf", "finite"),
    overridden("fusion.betas=[1.5, 0.9]", "1.5", "not below 1", key="fusion.betas.0"),
    overridden("model.source=5", "5", "not a text"),
    overridden("calibration.length=1", "1", "not 2 or more"),
    overridden("calibration.windows=6", "6", "not a multiple of fusion.batch = 4", "use 8"),
    overridden(
        "calibration.windows=2",
        "4",
        "first of the 2 calibration windows",
        "raise",
        key="importance.windows",
    ),
    overridden("cluster.workers=3", "3", "does not divide fusion.batch = 4", r"\[1, 2, 4\]"),
    overridden("calibration.length=65", "65", "longer than the model's 64 positions", "at most 64"),
    overridden("calibration.data=''", "''", "an empty text|no such file"),
    overridden(
        "evaluation.a={data: a.txt, length: 65}",
        "65",
        "longer than .* 64",
        "at most 64",
        key="evaluation.a.length",
    ),
    overridden("evaluation.a=5", "5", "not a section", "{data: 5}"),
    overridden("output.name=a/b", "'a/b'", "characters that cannot stand here"),
    overridden("output.name=..", "'..'", "characters that cannot stand here"),
    overridden(
        "seed=0x" + "f" * 9000,
        "…",
        "not below 9223372036854775808",
        "give a whole number",
        "seed",
        "seed-of-many-digits",
    ),
    overridden("seed=" + "9" * 5000, "…", "not YAML", "quote it", "--set", "seed-of-more-digits"),
    overridden("seed=!!timestamp 2001-99-99", "seed=", "not YAML", "quote it", "--set"),
    overridden("seed=!!int {}", "seed=", "not YAML", "quote it", "--set"),
    overridden("? [1]=2", "2", "unknown key", "sparsity", "? [1]"),
    overridden("=2", "'=2'", "not of the form", "write for example", "--set"),
    overridden(
        "model.source.deeper=2",
        "'model.source.deeper=2'",
        "model.source is not a section, but '",
        "docs/recipe.md.* --set 'model.source={deeper: …}'",
        "--set",
    ),
    overridden("seed=*other", "'seed=*other'", "alias", "quote it", "--set"),
    overridden(
        r'calibration.data="a\0b"', r"a\x00b", "no such file|cannot be read|neither", "path"
    ),
    overridden("evaluation={1: {data: a.txt}}", "1", "not a text", "in quotes", "evaluation.1"),
    overridden(
        "evaluation={a: {data: b.txt, 5: 6}}", "", "no text|unknown", "quotes", key="evaluation.a.5"
    ),
    overridden("calibration.length=1e400", "", "whole number|finite", "give a whole number"),
    overridden("calibration.windows=99999999999999999999", "99999", "not 10000000 or less"),
    overridden("fusion.rank=99999999999999999999", "99999", "not 10000000 or less"),
    overridden("output.shard_gb=0", "0", "not above 0"),
    overridden("output.shard_gb=.inf", "inf", "finite"),
    overridden("output.uri=/proc/fusegpt", "'/proc/fusegpt'", "cannot be written", "your rights"),
    overridden(
        "output.uri=heldout.txt/deep", "'heldout.txt/deep'", "cannot be written", "the path"
    ),
    overridden(
        "output.uri=nosuch://bucket/out",
        "'nosuch://bucket/out'",
        "cannot be written .*nosuch",
        "the path",
    ),
]


@table(SETTINGS)
def test_settings(
    bad: Bad, desk: Desk, weight_reads: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    check(bad, desk, weight_reads, capsys)
