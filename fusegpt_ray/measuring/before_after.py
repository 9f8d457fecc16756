"""What the dense and the published model write after the same prompts, to be read side by side.

The continuations are greedy, so they are the same each time on the same hardware. They are for
people: a model that cannot write them here, for want of memory or because its class's `generate`
fails, is published all the same, and a line says why. Lost replicas and a failing store are no such
reasons.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fusegpt_ray.cost.footprint import generating_bytes
from fusegpt_ray.errors import StorageError, UserError, first_line
from fusegpt_ray.model.runner import Runner
from fusegpt_ray.model.sampling import continuations
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.preparing.generation import ends_of
from fusegpt_ray.preparing.preflight import check_tokens
from fusegpt_ray.preparing.sample_prompts import KEY, TOKENS, Prompt, positions
from fusegpt_ray.run.known import Known
from fusegpt_ray.samples import InMemoryInputs, Inputs
from fusegpt_ray.terminal.display import Display, byte_count
from fusegpt_ray.text.calibration import leading_token, tokenize
from fusegpt_ray.text.questions import Question
from fusegpt_ray.workers.base import Workers

_NONE = InMemoryInputs({})
"""Beside a prompt without an image."""


class _Unable(Exception):
    """A replica's model cannot write, as it says."""


def before_and_after(
    workers: Workers,
    prompts: Sequence[Prompt],
    published: Stack,
    known: Known,
    show: Display,
) -> list[dict[str, Any]]:
    """[{"prompt", "dense", "published"} …]: each prompt with what either model writes after it, up
    to `TOKENS` tokens; and the image that it is about, if it is, as `Question.told` has it.

    Args:
        published: a stack that is a whole checkpoint, as `open_published` has it.
        known: holds what the dense model writes.
    """
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    questions = [prompt for prompt in prompts if isinstance(prompt, Question)]
    found = []
    for what, part in (("text samples", texts), ("samples about images", questions)):
        try:
            found += _side_by_side(workers, part, published, known)
        except (MemoryError, UserError, _Unable) as error:
            show.say(f"no {what}: the models cannot write them here ({first_line(error)})")
    return found


def _side_by_side(
    workers: Workers,
    prompts: Sequence[Prompt],
    published: Stack,
    known: Known,
) -> list[dict[str, Any]]:
    """Of prompts that are all of text, or all about images."""
    if not prompts:
        return []
    ids = _tokens(workers, prompts)
    inputs = [prompt.inputs if isinstance(prompt, Question) else _NONE for prompt in prompts]
    key: dict[str, Any] = {"prompts": [row.tolist() for row in ids], "tokens": TOKENS}
    if seen := [own.digest.hex() for own in inputs if own is not _NONE]:
        key["images"] = seen

    def dense() -> list[str]:
        return _written(workers, ids, inputs, workers.setup.dense)

    before = known.measured("continuations", key, dense)
    after = _written(workers, ids, inputs, published)
    return [
        {**_told(prompt), "dense": old, "published": new}
        for prompt, old, new in zip(prompts, before, after, strict=True)
    ]


def _told(prompt: Prompt) -> dict[str, Any]:
    return {"prompt": prompt} if isinstance(prompt, str) else prompt.told()


def _tokens(workers: Workers, prompts: Sequence[Prompt]) -> list[np.ndarray]:
    """Token ids of each, int32 [tokens], behind the token that the tokenizer puts before a text, if
    it does. The end of a prompt stays where the model has few positions.
    """
    source, dense = workers.setup.source, workers.setup.dense
    tokenizer = source.tokenizer()
    leading = leading_token("auto", tokenizer, KEY)
    begin = [] if leading is None else [leading]
    room = max(1, positions(dense.config) // 2 - len(begin))
    rows = []
    for prompt in prompts:
        if isinstance(prompt, Question):
            rows.append(np.array(prompt.tokens, dtype=np.int32))
            continue
        ids = [*begin, *tokenize(prompt, tokenizer).tolist()[-room:]]
        if not ids:
            raise UserError(KEY, prompt, "has no tokens", "give another prompt")
        rows.append(np.array(ids, dtype=np.int32))
    check_tokens(source, dense, *(row[None] for row in rows))
    return rows


def _written(
    workers: Workers, prompts: Sequence[np.ndarray], inputs: Sequence[Inputs], stack: Stack
) -> list[str]:
    longest = min(positions(stack.config), max(map(len, prompts)) + TOKENS)
    needed, room = generating_bytes(stack, workers.dtype, longest), workers.device_bytes
    if needed > room:
        problem = f"a replica needs {byte_count(needed)} for a whole model, has {byte_count(room)}"
        raise MemoryError(problem)
    tokenizer = workers.setup.source.tokenizer()
    task = (stack, prompts, inputs, positions(stack.config), ends_of(workers, tokenizer))
    ((_, rows),) = workers.map(_continued, [task], workers.setup.importance.batch)
    if isinstance(rows, str):
        raise _Unable(rows)
    return [str(tokenizer.decode(row.tolist(), skip_special_tokens=True)) for row in rows]


def _continued(
    runner: Runner,
    stack: Stack,
    prompts: Sequence[np.ndarray],
    inputs: Sequence[Inputs],
    positions: int,
    ends: Sequence[int],
) -> list[np.ndarray] | str:
    """One prompt at a time: without padding, no class of models can be misled by it. In words, why
    the model cannot write.
    """
    there = runner.for_trunk_of(stack)
    rows = []
    for prompt, own in zip(prompts, inputs, strict=True):
        length = min(positions, len(prompt) + TOKENS)
        try:
            rows += continuations(there, [prompt], length, 0.0, 1.0, ends, 0, own.load())
        except StorageError:
            raise
        except Exception as error:  # memory ran out, or whatever a class's own `generate` raises
            return first_line(error)
    return rows
