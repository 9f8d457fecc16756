"""Mistakes in recipes, arguments and output folders."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from desk import LENGTH, Desk, random_text
from mistakes import Bad, check, table
from stopped_runs import stopped

from fusegpt_ray.cli import main


def test_the_intact_recipe_runs_and_reads_weights(desk: Desk, weight_reads: list[str]) -> None:
    assert main(["compress", desk.write(method="mi", sparsity=0.2)]) == 0
    assert weight_reads and (desk.out / "demo-p20/fusegpt.json").exists()


# --- the recipe ---


def overridden(
    setting: str, value: str, problem: str, fix: str = "", key: str = "", name: str = ""
) -> Bad:
    """`--set setting` on a good recipe."""

    def make(desk: Desk) -> list[str]:
        return ["compress", desk.write(), "--set", setting]

    key = key or setting.partition("=")[0]
    return Bad(name or setting, make, key, value, problem, fix or f"change {key}")


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
    overridden("sparsity=some", "'some'", "valid number", key="sparsity.0"),
    overridden("metod=mi", "'mi'", "unknown key", "did you mean method"),
    overridden("fusion.los=batch_kl", "'batch_kl'", "unknown key", "did you mean fusion.loss"),
    overridden("model.nonsense=1", "1", "unknown key", "dtype"),
    overridden("calibration.lenght=8", "8", "unknown key", "did you mean calibration.length"),
    overridden("importance.metric=bi", "'bi'", "unknown key", "windows"),
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
    overridden("seed.of=3", "{'of'", "valid integer", key="seed"),
    overridden("method=magic", "'magic'", "'mi', 'mi\\+ft' or 'fusegpt'"),
    overridden("cluster.engine=spark", "'spark'", "'ray' or 'local'"),
    overridden("fusion.loss=mse", "'mse'", "'batch_kl' or 'normalized_mse'"),
    overridden("fusion.preset=best", "'best'", "'default' or 'paper'"),
    overridden("fusion.epochs=many", "'many'", "valid integer"),
    overridden("fusion.epochs=1.5", "1.5", "valid integer"),
    overridden("fusion.batch=1", "1", "greater than or equal to 2"),
    overridden("fusion=7", "7", "dictionary"),
    overridden("fusion.learning_rate=-1", "-1", "greater than 0"),
    overridden("fusion.learning_rate=.nan", "nan", "greater than 0|finite"),
    overridden("fusion.learning_rate=.inf", "inf", "finite"),
    overridden("fusion.betas=[1.5, 0.9]", "1.5", "less than 1", key="fusion.betas.0"),
    overridden("model.source=5", "5", "valid string"),
    overridden("calibration.length=1", "1", "greater than or equal to 2"),
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
    overridden("calibration.data=''", "''", "at least 1 character|no such file"),
    overridden(
        "evaluation.a={data: a.txt, length: 65}",
        "65",
        "longer than .* 64",
        "at most 64",
        key="evaluation.a.length",
    ),
    overridden("evaluation.a=5", "5", "dictionary"),
    overridden("output.name=a/b", "'a/b'", "should match pattern"),
    overridden("output.name=..", "'..'", "should match pattern"),
    overridden(
        "seed=0x" + "f" * 9000,
        "…",
        "less than 9223372036854775808",
        "change seed",
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
        "source is not a section",
        "docs/recipe.md",
        "--set",
    ),
    overridden("seed=*other", "'seed=*other'", "alias", "quote it", "--set"),
    overridden(
        r'calibration.data="a\0b"', r"a\x00b", "no such file|cannot be read|neither", "path"
    ),
    overridden(
        "evaluation={1: {data: a.txt}}", "1", "valid string", "change", "evaluation.1.[key]"
    ),
    overridden("evaluation={a: {data: b.txt, 5: 6}}", "", "string|unknown", key="evaluation.a.5"),
    overridden("calibration.length=1e400", "", "integer|finite", "change"),
    overridden(
        "calibration.windows=99999999999999999999", "99999", "less than or equal to 10000000"
    ),
    overridden("fusion.rank=99999999999999999999", "99999", "less than or equal to 10000000"),
    overridden("output.shard_gb=0", "0", "greater than 0"),
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


def recipe_of(data: bytes) -> Callable[[Desk], list[str]]:
    def make(desk: Desk) -> list[str]:
        (desk.folder / "own.yaml").write_bytes(data)
        return ["compress", str(desk.folder / "own.yaml")]

    return make


LAUGHS = "\n".join(
    ["a0: &a0 [lol]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12))]
).encode()
"""Each line is ten of the one before."""


def its_own_link(desk: Desk) -> list[str]:
    (desk.folder / "loop.yaml").symlink_to("loop.yaml")
    return ["compress", "loop.yaml"]


def unreadable(desk: Desk) -> list[str]:
    (path := Path(desk.write())).chmod(0)
    return ["compress", str(path)]


def without(section: str) -> Callable[[Desk], list[str]]:
    def make(desk: Desk) -> list[str]:
        recipe = desk.recipe()
        del recipe[section]
        return recipe_of(json.dumps(recipe).encode())(desk)

    return make


QUICKSTART = "examples/quickstart.yaml"
RECIPES = [
    Bad(
        "missing",
        lambda desk: ["score", "no.yaml"],
        "recipe",
        "'no.yaml'",
        "No such file",
        "path of a YAML recipe",
    ),
    Bad(
        "folder",
        lambda desk: ["score", str(desk.model)],
        "recipe",
        "model'",
        "Is a directory",
        "path of a YAML recipe",
    ),
    Bad(
        "open-bracket", recipe_of(b"model: [1"), "recipe", "own.yaml", "not valid YAML", QUICKSTART
    ),
    Bad("list", recipe_of(b"[1, 2]"), "recipe", "own.yaml", "not a mapping", QUICKSTART),
    Bad("empty", recipe_of(b""), "recipe", "own.yaml", "not a mapping", QUICKSTART),
    Bad(
        "not-utf-8",
        recipe_of(b"\xff\xfe\x00"),
        "recipe",
        "own.yaml",
        "cannot be read",
        "YAML recipe",
    ),
    Bad(
        "key-twice",
        recipe_of(b"seed: 1\nseed: 2"),
        "recipe",
        "own.yaml",
        "'seed' is there twice",
        QUICKSTART,
    ),
    Bad(
        "code",
        recipe_of(b'!!python/object/apply:os.mkdir ["ran"]'),
        "recipe",
        "own.yaml",
        "not valid YAML",
        QUICKSTART,
    ),
    Bad("deep", recipe_of(b"[" * 3000), "recipe", "own.yaml", "not valid YAML .*deep", QUICKSTART),
    Bad(
        "alias-in-itself",
        recipe_of(b"model: &a [*a]"),
        "recipe",
        "own.yaml",
        "line 1: an alias",
        QUICKSTART,
    ),
    Bad("aliases", recipe_of(LAUGHS), "recipe", "own.yaml", "line 2: an alias", QUICKSTART),
    Bad(
        "aliases-merged",
        recipe_of(b"a: &a {b: 1}\nc:\n  <<: [*a, *a]"),
        "recipe",
        "own.yaml",
        "line 3: an alias",
        QUICKSTART,
    ),
    Bad("binary", recipe_of(bytes(range(128))), "recipe", "own.yaml", "not valid YAML", QUICKSTART),
    Bad(
        "too-large",
        recipe_of(b"# a long story\n" * 100_000),
        "recipe",
        "own.yaml",
        "longer than 1000000 bytes",
        "a YAML recipe",
    ),
    Bad(
        "many-keys",
        recipe_of(b"".join(b"k%d: 1\n" % n for n in range(9_000))),
        "model",
        "None",
        "missing",
        "add model",
    ),
    Bad(
        "keys-of-many-kinds",
        recipe_of(b"1: 2\n.nan: 3\n2001-01-01: 4\nnull: 5"),
        "model",
        "None",
        "missing",
        "add model",
    ),
    Bad(
        "a-list-for-a-key",
        recipe_of(b"? [1]\n: 2"),
        "recipe",
        "own.yaml",
        "not valid YAML .*line 1.*unhashable",
        QUICKSTART,
    ),
    Bad(
        "two-recipes",
        recipe_of(b"seed: 1\n---\nseed: 2"),
        "recipe",
        "own.yaml",
        "line 2: but found another document",
        QUICKSTART,
    ),
    Bad(
        "half-a-character", recipe_of(b'method: "\\ud800"'), "model", "None", "missing", "add model"
    ),
    Bad(
        "a-device",
        lambda desk: ["score", "/dev/full"],
        "recipe",
        "'/dev/full'",
        "longer than|cannot be read",
        "a YAML recipe",
    ),
    Bad("its-own-link", its_own_link, "recipe", "loop.yaml", "cannot be read", "a YAML recipe"),
    Bad(
        "unreadable",
        unreadable,
        "recipe",
        "recipe.yaml",
        "cannot be read .*ermission",
        "a YAML recipe",
    ),
    Bad("no-model", without("model"), "model", "None", "missing", "add model"),
    Bad("no-output", without("output"), "output", "None", "missing", "add output"),
]


@table(RECIPES)
def test_recipe_files(
    bad: Bad, desk: Desk, weight_reads: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    check(bad, desk, weight_reads, capsys)


# --- the output folder ---


def finished_before(desk: Desk) -> None:
    assert main(["compress", desk.write(method="mi")]) == 0


def stopped_before(desk: Desk) -> list[str]:
    """A run that was stopped after its first round; then another rate."""
    stopped(desk, sparsity=0.4)
    return ["compress", desk.write(), "--set", "fusion.learning_rate=0.002"]


def in_the_way(name: str) -> Callable[[Desk], None]:
    def make(desk: Desk) -> None:
        desk.out.mkdir()
        (desk.out / name).write_text("a file of the user's")

    return make


def linked(target: str) -> Callable[[Desk], None]:
    """The output folder is a link."""
    return lambda desk: desk.out.symlink_to(target)


def closed(desk: Desk) -> None:
    """The output folder may be read only."""
    desk.out.mkdir(mode=0o500)


OUTPUTS = [
    Bad("its-own-link", linked("out"), "output.uri", "out'", "cannot be written", "check the path"),
    Bad(
        "a-link-to-a-file",
        linked("heldout.txt"),
        "output.uri",
        "out'",
        "cannot be written",
        "check the path",
    ),
    Bad(
        "a-link-to-a-device",
        linked("/dev/null"),
        "output.uri",
        "out'",
        "cannot be written",
        "check the path",
    ),
    Bad(
        "may-not-be-written",
        closed,
        "output.uri",
        "out'",
        "cannot be written .*ermission",
        "your rights",
    ),
    Bad(
        "finished",
        finished_before,
        "output.name",
        "'demo'",
        "a finished model is already at .*demo-p40",
        "another output.name",
    ),
    Bad(
        "stopped",
        stopped_before,
        "output.name",
        "'demo'",
        r"recipe.fusion.learning_rate = .* 0.002",
        "--restart, which forgets it",
    ),
    Bad(
        "a-file-for-the-model",
        in_the_way("demo-p40"),
        "output.name",
        "'demo'",
        "demo-p40",
        "another",
    ),
    Bad(
        "a-file-for-the-run", in_the_way("demo.run"), "output.name", "'demo'", "demo.run", "another"
    ),
]


@table(OUTPUTS)
def test_outputs(
    bad: Bad, desk: Desk, weight_reads: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    check(bad, desk, weight_reads, capsys)


# --- fusegpt evaluate ---


def evaluated(name: str, key: str, value: str, problem: str, fix: str, **changes: str) -> Bad:
    """`fusegpt evaluate` with an argument changed."""

    def make(desk: Desk) -> list[str]:
        arguments = {"model": "model", "data": "heldout.txt", "length": str(LENGTH)} | changes
        return [
            "evaluate",
            arguments.pop("model"),
            *(part for key, value in arguments.items() for part in (f"--{key}", value)),
        ]

    return Bad(name, make, key, value, problem, fix)


EVALUATIONS = [
    evaluated(
        "no-model", "MODEL", "'nowhere'", "no such folder", "existing folder", model="nowhere"
    ),
    evaluated("no-text", "--data", "'no.txt'", "no such file", "path or glob", data="no.txt"),
    evaluated(
        "short-text", "--length", "12", "the text has . tokens", "more text", data="short.txt"
    ),
    evaluated(
        "long-windows",
        "--length",
        "65",
        "longer than the model's 64 positions",
        "at most 64",
        length="65",
    ),
    evaluated("no-length", "--length", "0", "greater than or equal to 2", "change", length="0"),
    evaluated("no-windows", "--windows", "0", "greater than or equal to 1", "change", windows="0"),
    evaluated(
        "no-replicas", "--replicas", "0", "greater than or equal to 1", "change", replicas="0"
    ),
]


@table(EVALUATIONS)
def test_evaluations(
    bad: Bad, desk: Desk, weight_reads: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (desk.folder / "short.txt").write_text(random_text(3, seed=3))
    check(bad, desk, weight_reads, capsys)


# --- a run that fails ---


def test_a_run_that_fails_says_where(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    """The same command would fail again, so nothing is said of it; another recipe may follow."""
    assert main(["compress", desk.write(), "--set", "fusion.learning_rate=1e30"]) == 1
    stdout, stderr = capsys.readouterr()
    end = stderr.splitlines()[-2:]
    assert stdout == "" and not list(desk.out.glob("*/fusegpt.json"))
    assert re.fullmatch(
        "failed: FloatingPointError: the fine-tuning loss became .* lower fusion.learning_rate",
        end[0],
    )
    assert end[1] == f"stopped in round 1 of 2; 0 are finished in {desk.out / 'demo.run'}"
    assert main(["compress", desk.write()]) == 0
