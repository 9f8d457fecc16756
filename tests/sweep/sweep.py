"""Tries every causal and image-text-to-text class of the installed transformers and writes what
became of each into docs/models.md. `make sweep` runs this file.

    python tests/sweep/sweep.py [--jobs 2] [--only NAME …] [--out docs/models.md]
        [--kept FILE] [--seconds 240] [--shard 1/4]

With `--kept`, outcomes are kept in a file, and a sweep that was stopped goes on from it. With
`--shard`, that is all that is written: every fourth class, from the first on.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")
os.environ["DS_ACCELERATOR"] = "cpu"
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(Path(__file__).parent)]

import transformers as tf  # noqa: E402 - after the environment is set, which is read once
from apart import cell, each_apart, tried, warm_up  # noqa: E402
from classes import all_classes  # noqa: E402
from trial import EXACT, FAILS, NOT_BUILT, REFUSED, Outcome  # noqa: E402

HEAD = """# Models

Every causal language model and every image-text-to-text model of transformers {version}, as
`make sweep` found it on tiny random checkpoints, of whose six blocks the second and the fourth are
made to matter least, so that blocks behind a gap get other numbers:

- **exact**: two blocks removed by `method: mi`; the published model's logits are those of the dense
  model that transformers loads, with these blocks handing on what enters them, to the last bit; it
  generates the same with a cache as without, and the same weights are tied. Where it says
  *fused*, `method: fusegpt` ran, too, and what it published loads plainly.
- **refused**: with a message and exit code 2, before any weight is read and anything is written.
- **FAILS**: what is left to do.
- **not built**: no small model could be made from the configuration class alone, or it does not
  run by itself.

Classes that see images are tried on text here. Calibration, healing and evaluation on images are
tried with the real processors of LLaVA, LLaVA-NeXT, LLaVA-OneVision, Qwen2-VL, Qwen2.5-VL,
Qwen3-VL, Gemma 3, InternVL, Idefics3 and PaliGemma.

{counts}
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=[], help="classes; nothing is written then")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "models.md")
    parser.add_argument("--kept", type=Path, help="a JSON file of outcomes")
    parser.add_argument("--shard", default="1/1", help="which of how many; needs --kept")
    parser.add_argument("--seconds", type=int, default=240, help="a class that takes longer fails")
    arguments = parser.parse_args()
    which, shards = map(int, arguments.shard.split("/"))
    if shards > 1 and arguments.kept is None:
        parser.error("--shard needs --kept")
    names = (arguments.only or all_classes())[which - 1 :: shards]
    outcomes = _read(arguments.kept)
    left = [name for name in names if name not in outcomes]
    warm_up()
    for name, found in each_apart(tried, left, arguments.seconds, _lost, arguments.jobs):
        outcomes[name] = found
        said = "; ".join(f"{key} {each.kind} {each.why}" for key, each in found.items())
        print(f"{len(outcomes)}/{len(names)} {name}: {said}", flush=True)
        if arguments.kept:
            arguments.kept.write_text(json.dumps(outcomes, default=Outcome.to_json, indent=1))
    outcomes = {name: outcomes[name] for name in names}
    if not arguments.only and shards == 1:
        arguments.out.write_text("\n".join(_table(outcomes)) + "\n")
    return int(any(each.kind == FAILS for found in outcomes.values() for each in found.values()))


def _read(kept: Path | None) -> dict[str, dict[str, Outcome]]:
    if kept is None or not kept.exists():
        return {}
    return {
        name: {method: Outcome(**each) for method, each in found.items()}
        for name, found in json.loads(kept.read_text()).items()
    }


def _lost(why: str) -> dict[str, Outcome]:
    return {"mi": Outcome(FAILS, why)}


def _table(outcomes: dict[str, dict[str, Outcome]]) -> Iterator[str]:
    counts = Counter(found["mi"].kind for found in outcomes.values())
    order = (EXACT, REFUSED, FAILS, NOT_BUILT)
    counted = ", ".join(f"{counts[kind]} {kind}" for kind in order)
    fused = sum(f.get("fusegpt", Outcome("")).kind == EXACT for f in outcomes.values())
    settled = counts[EXACT] + counts[REFUSED]
    longest = max(found["mi"].seconds for found in outcomes.values())
    summary = (
        f"{len(outcomes)} classes: {counted}. {fused} are fused. {settled / len(outcomes):.1%} are"
        f" exact, or refused\nin seconds: the slowest refusal took {longest:.1f}."
    )
    yield HEAD.format(version=tf.__version__, counts=summary)
    yield "| class | outcome | why, or how fusing goes |\n|---|---|---|"
    for name, found in outcomes.items():
        dropped, fusing = found["mi"], found.get("fusegpt")
        why = dropped.why
        if fusing:
            why = "fused" if fusing.kind == EXACT else f"fusegpt {fusing.kind}: {fusing.why}"
        yield f"| {name} | {dropped.kind} | {cell(why)} |"


if __name__ == "__main__":
    sys.exit(main())
