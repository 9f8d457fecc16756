"""Writes down what vLLM says of pairs of models. This file runs in vLLM's own environment, which
need not have anything of ours, and knows none of it; `served.py` starts it and judges the answers.

    python serve.py FOLDER [--seconds 300] [--list]

FOLDER holds a folder for each pair, and in it the models `dense` and `published`, and maybe
`by_transformers`, which runs in the class of transformers. Beside them comes
`answers.json`: by model, the tokens that vLLM read and wrote, and their log-probabilities; or the
problem that it had. Each pair has a process of its own, which is forked once vLLM is imported.

What is known of vLLM itself comes into `FOLDER/vllm.json`: its version and the classes it has.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_CPU_KVCACHE_SPACE="1",  # GiB
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1",
)

import torch
import vllm
from vllm.model_executor.models.registry import ModelRegistry

BY_TRANSFORMERS = "by_transformers"
MODELS = ("dense", "published", BY_TRANSFORMERS)
SPECIAL, PROMPT, NEW = 3, 24, 8
"""The first tokens are no text; the prompt is longer than any sliding window of the models."""
LAST = 250


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=int, default=300, help="for both models of a pair")
    parser.add_argument("--list", action="store_true", help="write vllm.json alone")
    arguments = parser.parse_args()
    facts = {"version": vllm.__version__, "classes": sorted(ModelRegistry.get_supported_archs())}
    (arguments.folder / "vllm.json").write_text(json.dumps(facts))
    if arguments.list:
        return 0
    pairs = sorted(path for path in arguments.folder.iterdir() if (path / MODELS[1]).is_dir())
    for number, pair in enumerate(pairs, 1):
        if not (pair / "answers.json").exists():
            _in_a_process(pair, arguments.seconds)
        print(f"{number}/{len(pairs)} {pair.name}", flush=True)
    return 0


def _in_a_process(pair: Path, seconds: int) -> None:
    part = pair / "answers.part"
    child = os.fork()
    if child == 0:
        signal.alarm(seconds)
        _answer(pair, part)
        os._exit(0)  # nothing of the process that was forked is to be ended
    os.waitpid(child, 0)
    answers = json.loads(part.read_text()) if part.exists() else {}
    for name in _models(pair):
        answers.setdefault(name, {"problem": f"not done after {seconds} s, or its process died"})
    part.write_text(json.dumps(answers))
    part.rename(pair / "answers.json")


def _answer(pair: Path, out: Path) -> None:
    answers: dict[str, Any] = {}
    for name in _models(pair):
        try:
            impl = "transformers" if name == BY_TRANSFORMERS else "auto"
            answers[name] = _read_and_write(pair / name, impl)
        except Exception as error:  # of whatever kind: the judge wants to know
            said = " ".join(f"{type(error).__name__}: {error}".split())
            answers = {each: {"problem": said} for each in _models(pair)} | answers
            break
        finally:
            out.write_text(json.dumps(answers))


def _models(pair: Path) -> list[str]:
    return [name for name in MODELS if (pair / name).exists()]


def _read_and_write(folder: Path, impl: str) -> dict[str, list[list[Any]]]:
    """The tokens of two prompts, which are read whole and then continued one by one, and the
    log-probabilities of all but the first.

    Args:
        impl: whose class runs the model, as vLLM calls that.
    """
    llm = vllm.LLM(
        model=str(folder),
        model_impl=impl,
        dtype="float32",
        max_model_len=64,
        max_num_seqs=2,
        enforce_eager=True,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        distributed_executor_backend="uni",
        limit_mm_per_prompt={"image": 0, "video": 0, "audio": 0},
    )
    generator = torch.Generator().manual_seed(2)
    prompts = torch.randint(SPECIAL, LAST, (2, PROMPT), generator=generator).tolist()
    found = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        vllm.SamplingParams(
            temperature=0,
            max_tokens=NEW,
            ignore_eos=True,
            detokenize=False,
            prompt_logprobs=0,
            logprobs=0,
        ),
        use_tqdm=False,
    )
    tokens, logprobs = [], []
    for item in found:
        written = item.outputs[0]
        tokens.append([*item.prompt_token_ids, *written.token_ids])
        entries = [*item.prompt_logprobs[1:], *written.logprobs]
        logprobs.append(
            [entry[token].logprob for token, entry in zip(tokens[-1][1:], entries, strict=True)]
        )
    return {"tokens": tokens, "logprobs": logprobs}


if __name__ == "__main__":
    sys.exit(main())
