"""Start whole commands of one name together, on a busy machine, again and again.

Of each race exactly one must publish; the others must end with exit code 2 and say who has the
name, or find the finished model. `make chaos` runs this file.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import yaml

TESTS = Path(__file__).parents[1]


def race(folder: Path, recipe: dict[str, object], runs: int) -> Counter[str]:
    """What became of so many commands, given at the same time."""
    folder.mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "fusegpt_ray.cli", "compress", str(folder / "recipe.yaml")]
    pipe, environment = subprocess.PIPE, os.environ | {"OMP_NUM_THREADS": "1"}
    started = []
    for _ in range(runs):
        started.append(subprocess.Popen(command, stderr=pipe, text=True, env=environment))
    ends: Counter[str] = Counter()
    for process in started:
        err = process.communicate()[1]
        ends[_end(process.returncode, err)] += 1
    left = sorted(path.name for path in (folder / "out").iterdir())
    if left != ["tiny-p12.5"]:
        ends[f"left {left}"] += 1
    return ends


def _end(code: int, err: str) -> str:
    if code == 0:
        return "found the finished model" if "nothing is left to do" in err else "published"
    if code == 2 and "is at work on" in err and "goes on" not in err:
        return "was refused"
    return f"ended with {code}: {err}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--races", type=int, default=50)
    parser.add_argument("--runs", type=int, default=3, help="commands a race")
    arguments = parser.parse_args()
    sys.path.insert(0, str(TESTS))
    from material import make_material
    from racing import load

    total: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="races") as name, load(busy=2):
        folder = Path(name)
        material = make_material(folder)
        for number in range(arguments.races):
            place = folder / str(number)
            recipe = material.recipe(place / "out", sparsity=0.125, method="mi", evaluation={})
            ends = race(place, recipe, arguments.runs)
            print(f"{number:>3}  {dict(ends)}", flush=True)
            total += ends
    print(dict(total))
    good = {"published", "was refused", "found the finished model"}
    return 0 if total["published"] == arguments.races and {*total} <= good else 1


if __name__ == "__main__":
    sys.exit(main())
