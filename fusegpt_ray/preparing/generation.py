"""Text that the dense model writes on workers, kept below the output URI.

Such a text has no end: its part number k continues the k-th few prompts by a seed of its own. Which
replica does it, and how many there are, is nothing to it; of more tokens, the first are the same.
Each part is created once and then read, never sampled anew: a GPU need not sample twice the same.
The folder is named by all that shapes the text, so that other runs take it as well.
"""

from __future__ import annotations

import hashlib
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice
from typing import Any

import numpy as np

from fusegpt_ray.cost.footprint import generating_bytes
from fusegpt_ray.errors import UserError
from fusegpt_ray.model.config import read_config
from fusegpt_ray.model.finite import explained
from fusegpt_ray.model.memory import find_batch_size
from fusegpt_ray.model.runner import Runner
from fusegpt_ray.model.sampling import ROWS as ROWS
from fusegpt_ray.model.sampling import continuations
from fusegpt_ray.recipe.recipe import Recipe
from fusegpt_ray.recipe.text_sections import GeneratedText, Text
from fusegpt_ray.run.identity import model_identity
from fusegpt_ray.run.outputs import GENERATED
from fusegpt_ray.run.shared import Shared
from fusegpt_ray.store import storage
from fusegpt_ray.store.records import DamagedRecord, checksum, opened, sealed
from fusegpt_ray.terminal.display import Display, byte_count
from fusegpt_ray.text.calibration import Stream, leading_token, tokenize
from fusegpt_ray.text.corpus import items, sources
from fusegpt_ray.text.mixture import seed_of
from fusegpt_ray.workers.base import Workers

GENERATED_EVENT = "generated"
"""What a display is told when parts have been written, with the seconds that it took."""
PROMPTS = 100_000
"""Of more prompts, the first so many are taken."""


def generated_stream(
    workers: Workers,
    recipe: Recipe,
    text: GeneratedText,
    tokens: int,
    key: str,
    show: Display,
    shared: Shared,
) -> Stream:
    """The first so many tokens of a text that the dense model writes; what is not there yet is
    written when they are drawn.

    Args:
        key: of the text.
        shared: knows the model's identity, or is told.

    Raises:
        UserError: the prompts cannot be read; when tokens are drawn: the model does not fit into a
            replica's memory, its numbers overflow, or it writes nothing.
    """
    tokenizer = workers.setup.source.tokenizer()
    if text.prompts is None:
        prompts = [np.array([tokenizer.bos_token_id], dtype=np.int32)]
    else:
        prompts = _prompts(text.prompts, tokenizer, recipe.calibration.length, key)
        random.Random(recipe.calibration.seed).shuffle(prompts)
    ends = ends_of(workers, tokenizer)
    return _Written(workers, recipe, text, tokens, key, show, shared, prompts, ends).stream


def check_beginning(text: GeneratedText, tokenizer: Any, key: str) -> None:
    """
    Raises:
        UserError: nothing to continue: no prompts, and no token that begins a text.
    """
    if text.prompts is None and tokenizer.bos_token_id is None:
        problem = "the model's tokenizer has no beginning-of-sequence token to continue"
        raise UserError(f"{key}.generate", True, problem, "name a file of prompts")


def _prompts(text: Text, tokenizer: Any, length: int, key: str) -> list[np.ndarray]:
    """Token ids of each, int32 [tokens], behind the token that the tokenizer puts before a text, if
    it does. A long one is cut, so that half a window stays.
    """
    leading = leading_token("auto", tokenizer, key)
    begin = np.array([] if leading is None else [leading], dtype=np.int32)
    found = (item for source in sources(text, key) for item in items(source))
    tokens = (tokenize(item, tokenizer) for item in islice(found, PROMPTS))
    prompts = [np.concatenate([begin, ids])[: max(1, length // 2)] for ids in tokens if len(ids)]
    if not prompts:
        raise UserError(f"{key}.generate", text.data, "holds no prompts", "give one a line or row")
    return prompts


def identity_of_model(workers: Workers, shared: Shared) -> dict[str, Any]:
    """See `model_identity`: once for all that needs it, as 140 GB take minutes to read."""
    setup = workers.setup
    of = {"of": setup.source.folder}
    return shared.once("model", of, partial(model_identity, setup.dense))


def ends_of(workers: Workers, tokenizer: Any) -> list[int]:
    """The tokens after which the model goes on with nothing."""
    text = read_config(workers.setup.dense.config).get_text_config()
    told = getattr(text, "eos_token_id", None)  # some have none at all (Molmo2)
    several = told if isinstance(told, list) else [told]
    return sorted({end for end in (*several, tokenizer.eos_token_id) if end is not None})


@dataclass
class _Written:
    """One text, as far as it is written."""

    workers: Workers
    recipe: Recipe
    text: GeneratedText
    tokens: int
    """That are wanted of it."""
    key: str
    show: Display
    shared: Shared
    prompts: Sequence[np.ndarray]
    ends: Sequence[int]
    sizes: list[int] = field(default_factory=list)
    """Tokens of each part that is known to be there."""
    rows: int = ROWS
    """Prompts that are continued at once, as far as the memory allows."""

    @cached_property
    def id(self) -> str:
        """Changes with all that shapes the text."""
        return checksum(
            {
                "model": identity_of_model(self.workers, self.shared),
                "arithmetic": str(self.workers.dtype).removeprefix("torch."),
                "prompts": [hashlib.sha256(ids.tobytes()).hexdigest() for ids in self.prompts],
                "ends": self.ends,
                "rows": ROWS,
                "length": self.length,
                "temperature": self.text.temperature,
                "top_p": self.text.top_p,
                "seed": self.recipe.calibration.seed,
            }
        )

    @property
    def length(self) -> int:
        """Tokens of a window."""
        return self.recipe.calibration.length

    @property
    def folder(self) -> str:
        """Where its parts lie."""
        output = storage.absolute(self.recipe.output.uri)
        return storage.join(output, GENERATED.format(self.id[:16]))

    def stream(self) -> Iterator[np.ndarray]:
        """Its tokens, int32 [tokens] a part; see `Stream`."""
        self._write()
        left, number = self.tokens, 0
        while left:
            part = self._read(number)
            if part is None:
                raise RuntimeError(f"{self._file(number)} was removed while the text was read")
            yield part[:left]
            left, number = max(0, left - len(part)), number + 1

    def _write(self) -> None:
        """See that as many parts are there as the tokens need."""
        while (missing := self.tokens - sum(self.sizes)) > 0:
            known = len(self.sizes)
            most = ROWS * (self.length - min(map(len, self.prompts)))
            each = sum(self.sizes) / known if known else most
            numbers = range(known, known + math.ceil(missing / each))
            there = ((number, self._read(number)) for number in numbers)
            parts = {number: part for number, part in there if part is not None}
            if absent := [number for number in numbers if number not in parts]:
                parts |= self._generate(absent)
            self.sizes += [len(parts[number]) for number in numbers]
            if all(np.isin(part, self.ends).all() for part in parts.values()):
                problem = "the model ends its text at once, whatever it is to continue"
                fix = "give other prompts, or text in data"
                raise UserError(f"{self.key}.generate", self.text.generate, problem, fix)

    def _generate(self, numbers: Sequence[int]) -> dict[int, np.ndarray]:
        """Let the replicas write these parts, and keep each as soon as it is there."""
        setup = self.workers.setup
        self._check_memory()
        again = "" if not self.sizes else ", as texts ended early"
        self.show.stage(f"the dense model writes {self.text.label}{again}", len(numbers))
        settings = (self.length, self.text.temperature, self.text.top_p, self.ends)
        done: dict[int, np.ndarray] = {}
        began = time.monotonic()

        def attempt(rows: int) -> None:
            left = [number for number in numbers if number not in done]
            tasks = [
                (self._prompts_of(number), *settings, seed_of(int(self.id, 16), f"part {number}"))
                for number in left
            ]
            for task, found in self.workers.map(_continued, tasks, rows):
                done[left[task]] = self._keep(left[task], found)
                self.show.part(len(done), len(numbers))

        with explained(setup.dense, setup.source.name, self.workers.dtype):
            _, self.rows = find_batch_size(attempt, self.rows, ROWS, "writing text")
        self.show.tell(
            GENERATED_EVENT, text=self.text.label, seconds=round(time.monotonic() - began, 3)
        )
        return done

    def _check_memory(self) -> None:
        workers = self.workers
        needed = generating_bytes(workers.setup.dense, workers.dtype, self.length)
        if needed > (room := workers.device_bytes):
            problem = (
                f"to write text, a replica needs {byte_count(needed)} for the whole model, and has "
                f"{byte_count(room)}"
            )
            fix = "give text that was written elsewhere in data, or use replicas with more memory"
            raise UserError(f"{self.key}.generate", self.text.generate, problem, fix)

    def _prompts_of(self, number: int) -> list[np.ndarray]:
        """Those after the last part's; after the last prompt comes the first."""
        first, there = number * ROWS, len(self.prompts)
        return [self.prompts[place % there] for place in range(first, first + ROWS)]

    def _keep(self, number: int, tokens: np.ndarray) -> np.ndarray:
        """The part that is there from now on: this, or what another run has written meanwhile."""
        try:
            storage.create(self._file(number), sealed({"tokens": tokens.tolist()}))
        except FileExistsError:
            there = self._read(number)
            return self._keep(number, tokens) if there is None else there
        return tokens

    def _read(self, number: int) -> np.ndarray | None:
        """A part that is there."""
        file = self._file(number)
        if not storage.exists(file):
            return None
        try:
            return np.array(opened(storage.read(file))["tokens"], dtype=np.int32)
        except DamagedRecord as error:
            self.show.say(f"WARNING: {file} is damaged ({error}); writing this part of it again")
            storage.remove(file)
            return None

    def _file(self, number: int) -> str:
        return storage.join(self.folder, f"part-{number:06d}.json")


def _continued(runner: Runner, prompts: list[np.ndarray], *settings: Any) -> np.ndarray:
    return np.concatenate(continuations(runner, prompts, *settings))
