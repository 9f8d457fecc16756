"""Recipe files that cannot be read, are no recipe, or lack something."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from desk import Desk
from mistakes import Bad, check, table

from fusegpt_ray.cli import main


def test_the_intact_recipe_runs_and_reads_weights(desk: Desk, weight_reads: list[str]) -> None:
    assert main(["compress", desk.write(method="mi", sparsity=0.2)]) == 0
    assert weight_reads and (desk.out / "demo-p20/fusegpt.json").exists()


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
