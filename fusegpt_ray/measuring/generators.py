"""What writes tokens while it is timed: plain transformers, or vLLM.

Shapes: B sequences of a batch, P tokens of the prompt, V vocabulary.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import transformers

from fusegpt_ray.errors import UserError, reading_users_file
from fusegpt_ray.measuring.checkpoint import KEY, Checkpoint, load
from fusegpt_ray.measuring.timing import Stopwatch

VLLM_MEMORY = 0.9
"""Of a GPU's memory, shared evenly by the models: vLLM takes its part at the start."""


@dataclass(frozen=True)
class Turn:
    """The times of one run."""

    prefill: float
    """Seconds until the logits of each sequence's first new token are there."""
    decode: float
    """Seconds that a further token takes, of all sequences together."""
    peak_bytes: int | None
    """The most memory of the device that weights and work have taken; None where nobody counts."""


@dataclass(frozen=True)
class Work:
    """What a turn is."""

    ids_BP: torch.Tensor
    """The prompts."""
    new: int
    """Tokens that continue each, by greedy choice; two at least."""
    models: int
    """How many generators live on the device at the same time."""


class Generator(Protocol):
    """A loaded model."""

    name: str
    """What runs it, with its version."""

    def turn(self) -> Turn:
        """Do the work once."""

    def close(self) -> None:
        """Give the device's memory back."""


class Plain:
    """`from_pretrained` and `generate` of transformers."""

    def __init__(self, checkpoint: Checkpoint, folder: str, dtype: str, work: Work) -> None:
        self.name = f"transformers {transformers.__version__}"
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        before = self._allocated()
        self.model = load(checkpoint, folder, dtype, self.device)
        # Not the checkpoint's own: it may sample, stop early or search beams.
        self.model.generation_config = transformers.GenerationConfig()
        self.ids_BP, self.new = work.ids_BP.to(self.device), work.new
        self.weights = self._allocated() - before

    @torch.inference_mode()
    def turn(self) -> Turn:
        before = self._allocated()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        watch = Stopwatch(self._wait)
        waiting = iter([watch.mark])

        def first_only(_: torch.Tensor, logits_BV: torch.Tensor) -> torch.Tensor:
            """The moment when the prefill is done; at later tokens nobody waits for the device."""
            for mark in waiting:
                mark()
            return logits_BV

        watch.mark()
        written = self.model.generate(
            input_ids=self.ids_BP,
            attention_mask=torch.ones_like(self.ids_BP),
            logits_processor=transformers.LogitsProcessorList([first_only]),
            max_new_tokens=self.new,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
        )
        watch.mark()
        assert written.shape[1] == self.ids_BP.shape[1] + self.new, "nothing may end it early"
        peak = None
        if self.device.type == "cuda":
            # Other models' weights lie beside ours: only the difference is ours.
            peak = self.weights + torch.cuda.max_memory_allocated() - before
        prefill, decode = watch.laps
        return Turn(prefill, decode / (self.new - 1), peak)

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated() if self.device.type == "cuda" else 0

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def close(self) -> None:
        del self.model
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


class Vllm:
    """vLLM's offline interface, `LLM.generate`, which returns once all tokens are on the host.

    It does not tell reliably when the first token was there. So it writes one token, and then the
    same and all others: what the second takes longer is the decoding.
    """

    def __init__(self, checkpoint: Checkpoint, folder: str, dtype: str, work: Work) -> None:
        # Read at the import. Stdout is the result's, and its news would drown ours.
        os.environ["VLLM_LOGGING_STREAM"] = "ext://sys.stderr"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        import vllm

        self.name = f"vllm {vllm.__version__}"
        batch, prompt = work.ids_BP.shape
        self.llm = vllm.LLM(
            model=folder,
            dtype=dtype,
            skip_tokenizer_init=True,  # prompts are tokens
            enable_prefix_caching=False,  # the same prompts come again, and so must their prefill
            max_model_len=prompt + work.new,
            max_num_seqs=batch,
            gpu_memory_utilization=VLLM_MEMORY / work.models,
            seed=0,
        )
        self._params = vllm.SamplingParams
        self.prompts = [{"prompt_token_ids": ids_P} for ids_P in work.ids_BP.tolist()]
        self.new = work.new

    def turn(self) -> Turn:
        watch = Stopwatch(lambda: None)
        watch.mark()
        for new in (1, self.new):
            params = self._params(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
            found = self.llm.generate(self.prompts, params, use_tqdm=False)
            watch.mark()
            assert all(len(item.outputs[0].token_ids) == new for item in found)
        first, whole = watch.laps
        # Of memory it takes all that it may have, for its cache.
        return Turn(first, (whole - first) / (self.new - 1), None)

    def close(self) -> None:
        del self.llm


KINDS: Mapping[str, type[Plain] | type[Vllm]] = {"transformers": Plain, "vllm": Vllm}


def check_installed(kind: str) -> None:
    """
    Raises:
        UserError: vLLM is asked for, and is not there.
    """
    if kind == "vllm" and importlib.util.find_spec("vllm") is None:
        fix = "install it (pip install vllm), or leave --with out"
        raise UserError("--with", kind, "vLLM is not installed here", fix)


def opened(kind: str, checkpoint: Checkpoint, folder: str, dtype: str, work: Work) -> Generator:
    """The model of a local folder, loaded.

    Raises:
        UserError: the library does not load it.
    """
    fix = "give a model that the library loads, or fewer at once"
    with reading_users_file(KEY, checkpoint.name, f"{kind} does not load it", fix, folder):
        return KINDS[kind](checkpoint, folder, dtype, work)
