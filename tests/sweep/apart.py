"""Gives each class a process of its own, so that one that hangs or crashes costs nothing but its
row. Both sweeps run their classes so.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar

import torch
import transformers as tf
from trial import Outcome, try_class

T = TypeVar("T")


def warm_up() -> None:
    """What the first class imports takes longer than the class itself: it is imported here, once,
    for all processes that are forked.
    """
    _be_quiet()
    tried("LlamaForCausalLM")


def tried(name: str) -> dict[str, Outcome]:
    """What becomes of a class, with folders that only it has."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FUSEGPT_CACHE"] = f"{folder}/cache"
        return try_class(name, Path(folder))


def each_apart(
    work: Callable[[str], T],
    names: Sequence[str],
    seconds: int,
    lost: Callable[[str], T],
    jobs: int = 1,
) -> Iterator[tuple[str, T]]:
    """What `work` says of each class, in their order.

    Args:
        seconds: each has so long.
        lost: what is said of a class whose process did not answer, by why.
        jobs: so many classes at once.
    """

    def one(name: str) -> T:
        return _apart(work, name, seconds, lost)

    with ThreadPoolExecutor(jobs) as pool:
        yield from zip(names, pool.map(one, names), strict=True)


def _apart(work: Callable[[str], T], name: str, seconds: int, lost: Callable[[str], T]) -> T:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(work, name, theirs))
    process.start()
    theirs.close()
    try:
        if ours.poll(seconds):
            return ours.recv()
        return lost(f"not done after {seconds} s")
    except EOFError:
        process.join()
        return lost(f"its process died (exit code {process.exitcode})")
    finally:
        process.kill()
        process.join()


def _answer(work: Callable[[str], T], name: str, connection: Connection) -> None:
    _be_quiet()
    connection.send(work(name))


def _be_quiet() -> None:
    """One thread, and nothing of what transformers says and shows."""
    torch.set_num_threads(1)
    tf.logging.set_verbosity_error()
    tf.logging.disable_progress_bar()


def cell(text: str) -> str:
    """Of a table in Markdown."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
