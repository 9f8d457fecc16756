"""Holds what vLLM makes of published models against transformers, for every class of text
that both have, and writes docs/serving.md. `make served VLLM=…` runs this file.

    python tests/sweep/served.py --vllm PYTHON [--only NAME …] [--out docs/serving.md]
        [--work FOLDER] [--seconds 300]

PYTHON is that of an environment with vLLM, on whatever device that runs. With `--only`, the page is
of these classes alone. With `--work`, models and
answers stay in a folder, and a sweep that was stopped goes on from it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")
os.environ["DS_ACCELERATOR"] = "cpu"
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(Path(__file__).parent)]

import torch  # noqa: E402 - after the environment is set, which is read once
import transformers as tf  # noqa: E402
from apart import cell, each_apart, warm_up  # noqa: E402
from classes import SIZES, all_classes, save_class  # noqa: E402
from older_keys import OLDER_KEYS  # noqa: E402
from trial import publish  # noqa: E402

from fusegpt_ray.publishing.in_vllm import INSTEAD, wrong_in_vllm  # noqa: E402

BOUND = 1e-4
"""Of a log-probability in float32, which is 10 to 80 here. Where vLLM computes what transformers
does in another order, it differs by some 2e-5; some kernels round more, in the dense model, too,
and then three times what that differs by is allowed."""

WIDE = SIZES | {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "word_embed_proj_dim"), 128),
    **dict.fromkeys(("embed_dim", "embedding_size", "lru_width", "emb_dim", "model_dim"), 128),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "decoder_ffn_dim"), 192),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "ffn_hidden_size"), 64),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size"), 64),
    **dict.fromkeys(("head_dim", "global_head_dim", "d_kv", "attention_head_dim"), 32),
    **dict.fromkeys(("q_lora_rank", "o_lora_rank", "qk_nope_head_dim", "v_head_dim"), 32),
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 64),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"), 320),
}
"""Kernels of vLLM want heads of 32 or more; and those for heads made from one latent vector, that
together with what is rotated it has 576 numbers."""

SEES = "ForConditionalGeneration"
"""Classes whose images vLLM wants to prepare, by files that are no part of a tiny model."""
DENSE_MODEL, PUBLISHED, BY_TRANSFORMERS = "dense", "published", "by_transformers"
"""The folders of a pair, as `serve.py` knows them."""
SAME, WARNED, FAILS = "same", "warned of", "FAILS"
DENSE, REFUSED = "not the dense one", "not made"
KINDS = (SAME, WARNED, FAILS, DENSE, REFUSED)

HEAD = """# In vLLM

Whether vLLM {version} makes of a published model what transformers {transformers} makes of it, as
`make served` found it for the classes below, all in [the table of models](models.md). Of
a tiny random checkpoint two blocks are removed by `method: mi`. vLLM reads two prompts of 24 tokens
and continues each by 8, in float32 on a CPU; transformers is given the same tokens by plain
`from_pretrained`.

- **same**: log-probabilities of the published model differ by at most {bound:g} from those of
  transformers, or by at most three times what the dense model's do, which is at most a thirtieth of
  what the removed blocks move them by. The table tells the three differences.
- **not the dense one**: vLLM does not serve this tiny dense model, or what it makes of it is not
  what transformers does. So nothing is said of what is published.
- **warned of**: vLLM takes what kind a block is from its number, and does not serve a model with
  these gaps. `fusegpt plan` and the model's card say so; what the card says instead serves it. With
  other gaps it may be the same.
- **FAILS**: so it is with the dense model, but not with the published one.
- **not made**: there is no such pair. The model is refused, as the table of models tells, or none
  could be made of the sizes that vLLM's kernels want.

{counts}

| class | outcome | largest difference, or why |
|---|---|---|
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vllm", required=True, help="Python of an environment with vLLM")
    parser.add_argument("--only", nargs="*", default=[], help="classes of text that vLLM has")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "serving.md")
    parser.add_argument("--work", type=Path, help="a folder for models and answers")
    parser.add_argument("--seconds", type=int, default=300, help="for a class in vLLM")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = arguments.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        serve = [arguments.vllm, Path(__file__).with_name("serve.py"), work]
        serve += ["--seconds", str(arguments.seconds)]
        subprocess.run([*serve, "--list"], check=True)
        known = json.loads((work / "vllm.json").read_text())
        names = [
            name
            for name in arguments.only or all_classes()
            if name in known["classes"] and SEES not in name
        ]
        warm_up()
        _told(each_apart(partial(_make, work), names, 240, _lost))
        subprocess.run(serve, check=True)
        outcomes = _told(each_apart(partial(_judge, work), names, 240, _lost))
    arguments.out.write_text("\n".join(_page(known["version"], outcomes)) + "\n")
    return int(any(kind == FAILS for kind, _ in outcomes.values()))


Outcome = tuple[str, str]
"""Its kind, and the difference or the reason."""


def _told(each: Iterator[tuple[str, Outcome]]) -> dict[str, Outcome]:
    found: dict[str, Outcome] = {}
    for name, outcome in each:
        found[name] = outcome
        print(f"{len(found)} {name}: {', '.join(outcome)}", flush=True)
    return found


def _lost(why: str) -> Outcome:
    return (FAILS, why)


def _make(work: Path, name: str) -> Outcome:
    """Lay the dense model and the published one into the pair's folder."""
    pair = work / name
    if pair.exists():
        return (SAME, "made before")
    with tempfile.TemporaryDirectory(dir=work) as folder:
        made = Path(folder, "pair")
        os.environ["FUSEGPT_CACHE"] = f"{folder}/cache"
        try:
            dense = save_class(name, made / DENSE_MODEL, WIDE)
            config = json.loads((dense / "config.json").read_text()) | OLDER_KEYS.get(name, {})
            (dense / "config.json").write_text(json.dumps(config, indent=2))
            published = publish(dense, Path(folder), Path(folder, "out"), "mi")
            published.rename(made / PUBLISHED)
            if INSTEAD in _warning(made):
                (made / BY_TRANSFORMERS).symlink_to(PUBLISHED)
        except Exception as error:  # of whatever kind: the table of models tells which matter
            said = " ".join(f"{type(error).__name__}: {error}".split())
            made.mkdir(exist_ok=True)
            shutil.rmtree(made / DENSE_MODEL, ignore_errors=True)
            (made / "problem.txt").write_text(said)
        made.rename(pair)
    return (SAME, "made")


def _judge(work: Path, name: str) -> Outcome:
    """Hold what vLLM said of a pair against transformers."""
    pair = work / name
    if (pair / "problem.txt").exists():
        return (REFUSED, (pair / "problem.txt").read_text())
    answers = json.loads((pair / "answers.json").read_text())
    if problem := answers[DENSE_MODEL].get("problem"):
        return (DENSE, problem)
    dense = _difference(name, pair / DENSE_MODEL, answers[DENSE_MODEL])
    warning = _warning(pair)
    if problem := answers[PUBLISHED].get("problem"):
        return (WARNED if warning else FAILS, problem)
    published = _difference(name, pair / PUBLISHED, answers[PUBLISHED])
    moved = _difference(name, pair / DENSE_MODEL, answers[PUBLISHED])
    if not 30 * dense <= moved:
        return (DENSE, f"the dense model differs by {dense:.1g}, and removed blocks by {moved:.1g}")
    bound = max(BOUND, 3 * dense)
    told = f"{published:.0e}; the dense one {dense:.0e}; removed blocks {moved:.2g}"
    if not warning:
        return (SAME if published <= bound else FAILS, told)
    if published <= bound:
        return (FAILS, f"warned of, and yet the same: {told}")
    instead = _difference(name, pair / PUBLISHED, answers[BY_TRANSFORMERS])
    return (WARNED if instead <= bound else FAILS, f"{told}; with `{INSTEAD}` {instead:.0e}")


def _warning(pair: Path) -> str:
    """What the published model's card says."""
    return wrong_in_vllm(json.loads((pair / PUBLISHED / "config.json").read_text()))


@torch.no_grad()
def _difference(name: str, folder: Path, said: dict[str, list[list[float]]]) -> float:
    """The largest between the log-probabilities that vLLM told and those of transformers."""
    model = getattr(tf, name).from_pretrained(folder, dtype=torch.float32).eval()
    tokens_BT = torch.tensor(said["tokens"], dtype=torch.long)
    logits_BTV = model(input_ids=tokens_BT, use_cache=False).logits
    next_BT1 = tokens_BT[:, 1:, None]
    logprobs_BT = logits_BTV[:, :-1].float().log_softmax(-1).gather(-1, next_BT1)[..., 0]
    return (logprobs_BT - torch.tensor(said["logprobs"])).abs().max().item()


def _page(version: str, outcomes: dict[str, Outcome]) -> Iterator[str]:
    counts = Counter(kind for kind, _ in outcomes.values())
    counted = ", ".join(f"{counts[kind]} {kind}" for kind in KINDS)
    summary = f"{len(outcomes)} classes: {counted}."
    facts = {"version": version, "transformers": tf.__version__, "bound": BOUND}
    yield HEAD.format(**facts, counts=summary).rstrip()
    for name, (kind, why) in outcomes.items():
        yield f"| {name} | {kind} | {cell(why[:240])} |"


if __name__ == "__main__":
    sys.exit(main())
