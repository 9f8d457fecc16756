"""`fusegpt speed`: prefill, decode and memory of several models, in turns.

Shapes: B sequences of a batch, P tokens of the prompt.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fusegpt_ray.errors import UserError
from fusegpt_ray.measuring.checkpoint import Checkpoint, short_names
from fusegpt_ray.measuring.generators import Generator, Turn, Work, check_installed, opened
from fusegpt_ray.measuring.timing import Spread, in_turns, ratios
from fusegpt_ray.model.config import read_config
from fusegpt_ray.model.memory import is_out_of_memory
from fusegpt_ray.terminal.display import Display

WARM_UPS = 1
"""Turns of which neither time nor memory counts: libraries choose kernels in them, and the process
takes what all models use later, such as the workspaces of cuBLAS."""


@dataclass(frozen=True)
class Trial:
    """What each model is to do."""

    prompt: int = 512
    """Tokens of each prompt."""
    new: int = 64
    """Tokens that are written after it; two at least."""
    batch: int = 1
    """Prompts at once."""
    runs: int = 5
    dtype: str = "auto"
    """Of the arithmetic; auto: as the model is stored."""
    kind: str = "transformers"
    """Or "vllm"."""


def speed(models: Sequence[str], trial: Trial, display: Display | None = None) -> dict[str, Any]:
    """Time models against each other: {"models": [{"model", "name", "dtype", "weights_bytes",
    "peak_bytes", "prefill": …, "decode": …} …] in the order given, "trial", "runner", "device",
    "versions"}.

    "prefill" and "decode" are {"seconds": `Spread`, "tokens_per_second", "times_as_fast":
    `Spread` of the ratios to the first model, turn by turn, "runs": [seconds …]}; those of decode
    are for one token of each sequence. All models are on the device at the same time, and take
    turns. "weights_bytes" is what the weights take in the dtype of the arithmetic. "peak_bytes" is
    the most that weights and work took in a turn; None where nobody counts: on a CPU, and by vLLM.

    Raises:
        UserError: a model does not load, its positions are too few, memory runs out, vLLM is asked
            for and not there, or a time is too short to be told.
    """
    check_installed(trial.kind)
    with display or Display() as show, ExitStack() as opening:
        show.stage("looking at the models")
        checkpoints = [Checkpoint.open(model) for model in models]
        for checkpoint in checkpoints:
            _check_positions(checkpoint, trial)
        ids_BP = prompts([checkpoint.config for checkpoint in checkpoints], trial)
        work = Work(ids_BP, trial.new, len(models))
        try:
            generators = [*_loaded(checkpoints, trial, work, opening, show)]
            show.stage(f"{WARM_UPS + trial.runs} turns of {len(models)} models")
            turns = in_turns([generator.turn for generator in generators], trial.runs, WARM_UPS)
        except Exception as error:
            if isinstance(error, UserError) or not is_out_of_memory(error):
                raise
            fix = "give fewer models or a smaller --batch or --prompt"
            raise UserError("--batch", trial.batch, "memory runs out", fix) from error
        names = short_names(checkpoints)
        rows = [
            {
                "model": checkpoint.name,
                "name": name,
                "dtype": checkpoint.arithmetic(trial.dtype),
                "weights_bytes": checkpoint.weights_bytes(trial.dtype),
                "peak_bytes": _most(mine),
                **_times(turns[0], mine, trial),
            }
            for checkpoint, name, mine in zip(checkpoints, names, turns, strict=True)
        ]
        runner = generators[0].name
    return {
        "models": rows,
        "trial": asdict(trial),
        "runner": runner,
        "device": _device(),
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda},
    }


def _loaded(
    checkpoints: Sequence[Checkpoint], trial: Trial, work: Work, opening: ExitStack, show: Display
) -> Iterator[Generator]:
    for checkpoint in checkpoints:
        show.stage(f"loading {checkpoint.name}")
        folder = opening.enter_context(checkpoint.local())
        generator = opened(trial.kind, checkpoint, folder, checkpoint.arithmetic(trial.dtype), work)
        opening.callback(generator.close)
        yield generator


def _most(turns: Sequence[Turn]) -> int | None:
    counted = [turn.peak_bytes for turn in turns if turn.peak_bytes is not None]
    return max(counted, default=None)


def _times(base: Sequence[Turn], mine: Sequence[Turn], trial: Trial) -> dict[str, Any]:
    """Of one model beside the first."""
    found = {}
    for what, tokens in (("prefill", trial.prompt), ("decode", 1)):
        its, own = ([getattr(turn, what) for turn in turns] for turns in (base, mine))
        if min(own) <= 0:
            problem = "decoding so few tokens takes less time than the runs differ by"
            raise UserError("--new", trial.new, problem, "give a larger number")
        middle = Spread.of(own)
        found[what] = {
            "seconds": middle.to_json(),
            "tokens_per_second": trial.batch * tokens / middle.median,
            "times_as_fast": Spread.of(ratios(its, own)).to_json(),
            "runs": own,
        }
    return found


def prompts(configs: Sequence[Mapping[str, Any]], trial: Trial) -> torch.Tensor:
    """Random tokens [B, P], always the same, that every model knows and that none takes for a
    special one, such as an image.
    """
    sizes = [int(read_config(config).get_text_config().vocab_size) for config in configs]
    special = {number for config in configs for number in _special(config)}
    usual = torch.tensor([number for number in range(min(sizes)) if number not in special])
    draw = torch.Generator().manual_seed(0)
    return usual[torch.randint(len(usual), (trial.batch, trial.prompt), generator=draw)]


def _special(config: Any) -> Iterator[int]:
    """The tokens that a configuration names: bos_token_id, image_token_index, …"""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _special(value)
        elif key.endswith(("token_id", "token_index")):
            yield from value if isinstance(value, list) else [value]


def _check_positions(checkpoint: Checkpoint, trial: Trial) -> None:
    text = read_config(checkpoint.config).get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    wanted = trial.prompt + trial.new
    if positions and 0 < positions < wanted:  # some classes say -1 for any number
        problem = f"with --new {wanted - trial.prompt} it is longer than the {positions} positions"
        fix = f"let both together be at most {positions}"
        raise UserError("--prompt", trial.prompt, f"{problem} of {checkpoint.name}", fix)


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cores = len(os.sched_getaffinity(0))
    return f"CPU ({platform.machine()}, {cores} cores, {torch.get_num_threads()} threads)"
