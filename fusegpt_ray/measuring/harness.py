"""The lm-eval library: the one place that imports it, and only when a task is asked for.

Its prompts, its data and its scoring are taken as they are, so that a number is the one that others
publish. What a task depends on besides the model is told by `Suite.identity`.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import logging
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from importlib.metadata import version
from inspect import getsource
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fusegpt_ray.errors import UserError, reading_users_file
from fusegpt_ray.model.processors import load_processor

USUAL = ("piqa", "winogrande", "hellaswag", "arc_easy", "arc_challenge")
"""The zero-shot tasks that papers on compressing models mostly report."""
SEEDS = {"random": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}
"""As lm-eval itself takes them where nobody says otherwise."""
TASKS = "--tasks"


@dataclass(frozen=True)
class Asked:
    """Which tasks, and how."""

    names: tuple[str, ...] = USUAL
    folder: str | None = None
    """Where task files of the user's lie; they go before the library's."""
    limit: int | None = None
    """Of the samples of each task, the first so many."""
    shots: int | None = None
    """Examples before each question; None: as the task says, which mostly is none."""


def check_installed() -> None:
    """
    Raises:
        UserError: the library is not there.
    """
    if importlib.util.find_spec("lm_eval") is None:
        fix = "install it: pip install 'fusegpt-ray[eval]'"
        raise UserError(TASKS, None, "tasks need the library lm-eval, which is not installed", fix)


def library() -> str:
    """The version of lm-eval."""
    return version("lm_eval")


@dataclass(frozen=True)
class Suite:
    """Tasks with their data, ready to be asked."""

    asked: Asked
    items: Mapping[str, Any]
    """By name, in order: the library's tasks, and groups that it gives one number to."""

    @classmethod
    def load(cls, asked: Asked) -> Suite:
        """Find the tasks and load their data, from the hub or its cache.

        Raises:
            UserError: a task is unknown, or its data or its file cannot be read.
        """
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        index = _index(asked)
        items: dict[str, Any] = {}
        for name in asked.names:
            if name not in index.task_index:
                raise unknown(name, index.all_tasks)
            fix = "give access to the hub, or task files with local data (--tasks-folder)"
            with reading_users_file(TASKS, name, "the task cannot be loaded", fix):
                # Sorted: the library keeps the tasks of a tag in no order.
                found = sorted(_numbered(index.load([name])), key=_name)
                items |= {_name(item): item for item in found}
        for name, item in items.items():
            for task in _leaves(item):
                if getattr(task, "UNSAFE_CODE", False):
                    problem, fix = "it runs code that the model writes", "use lm-eval for it"
                    raise UserError(TASKS, name, problem, fix)
                if _sees(task) and task.OUTPUT_TYPE != "generate_until":
                    problem = "of an image, lm-eval asks only for text that a model writes"
                    fix = "give the task output_type: generate_until, or leave it out"
                    raise UserError(TASKS, name, problem, fix)
                if getattr(task, "MULTIMODAL", False) and not _sees(task):
                    problem = "it asks about sounds"
                    raise UserError(TASKS, name, problem, "leave it out")
                # As `lm_eval.simple_evaluate` does: a task that says 0 means it.
                own = task.get_config("num_fewshot")
                if own is None or (own and asked.shots is not None):
                    task.set_config("num_fewshot", asked.shots or 0)
        return cls(asked, items)

    def sees(self, name: str) -> bool:
        """Whether images belong to its questions."""
        return any(map(_sees, _leaves(self.items[name])))

    def identity(self, name: str) -> dict[str, Any]:
        """All that a model's number on a task depends on, the model aside: version, settings,
        questions and answers, and the files of the user's folder, whose functions call others.
        """
        item, digest = self.items[name], sha256()
        for file in _own_files(self.asked.folder):
            digest.update(file.read_bytes())
        rules = getattr(item, "aggregate_metric_list", None) or ()  # of a group
        digest.update(_bytes([asdict(rule) for rule in rules]))
        for task in _leaves(item):
            digest.update(_bytes(task.config.to_dict(keep_callable=True)))
            examples = task.fewshot_docs() if task.get_config("num_fewshot") else None
            for document in chain(islice(task.eval_docs, self.asked.limit), examples or ()):
                digest.update(_bytes(document))
                if _sees(task):  # of whose images a document may hold the paths alone
                    fix = "mend the task's files, or leave the task out"
                    with reading_users_file(TASKS, name, "an image cannot be read", fix):
                        digest.update(_bytes(task.doc_to_image(document)))
        return {
            "task": name,
            "version": str(item.VERSION if hasattr(item, "VERSION") else item.version),
            "limit": self.asked.limit,
            "shots": self.asked.shots,
            "seeds": SEEDS,
            "lm_eval": library(),
            "contents": digest.hexdigest(),
        }

    def measure(self, name: str, model: Any) -> dict[str, Any]:
        """{"task", "metrics": {name: {"value", "stderr"}}, "samples", "of", "version", "shots"}.

        "samples" of the task's "of" were asked; "stderr" is None where the library knows none.
        `model`: see `wrapped`.
        """
        import lm_eval

        item = self.items[name]
        leaves = {task.task_name: task for task in _leaves(item)}
        groups = [] if name in leaves else [item, *item.get_all_groups()]
        random.seed(SEEDS["random"])
        np.random.seed(SEEDS["numpy"])
        torch.manual_seed(SEEDS["torch"])
        for task in leaves.values():
            task.set_fewshot_seed(SEEDS["fewshot"])
        found: Any = lm_eval.evaluate(
            model,
            {"tasks": leaves, "groups": {group.name: group for group in groups}},
            limit=self.asked.limit,
            log_samples=False,
        )
        counts = [found["n-samples"][leaf] for leaf in leaves]
        return {
            "task": name,
            "metrics": _metrics(found["results"][name]),
            "samples": sum(count["effective"] for count in counts),
            "of": sum(count["original"] for count in counts),
            "version": found["versions"].get(name),
            "shots": max(found["n-shot"][leaf] for leaf in leaves),
        }


def seeing(model: Any, folder: str, batch: int) -> Any:
    """As `wrapped`, for tasks with images: with the processor in the folder."""
    from lm_eval.models.hf_vlms import HFMultimodalLM

    class Seeing(HFMultimodalLM):
        """With the processor that is loaded everywhere else, too."""

        def _create_tokenizer(self, *_: Any, **__: Any) -> None:
            self.processor = load_processor(folder, trust_remote_code=False, local_files_only=True)
            self.tokenizer = self.processor.tokenizer

    found: Any = Seeing(model, batch_size=batch, trust_remote_code=False)
    found.generate_until = partial(found.generate_until, disable_tqdm=True)
    return found


def wrapped(model: Any, folder: str, batch: int) -> Any:
    """A loaded model as lm-eval runs it, with the tokenizer in the folder that it came from."""
    from lm_eval.models.huggingface import HFLM

    found = HFLM(model, tokenizer=folder, batch_size=batch, trust_remote_code=False)
    for kind in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        # Without bars of its own: our display is the one display.
        setattr(found, kind, partial(getattr(found, kind), disable_tqdm=True))
    return found


def _index(asked: Asked) -> Any:
    """Where tasks are found by name. The library's own take a while to be read, and are left out
    where the user's folder has all that is asked for.
    """
    from lm_eval.tasks import TaskManager

    if asked.folder:
        if not os.path.isdir(asked.folder):
            fix = "give the folder that holds your task files (*.yaml)"
            raise UserError("--tasks-folder", asked.folder, "no such folder", fix)
        own = TaskManager(include_path=asked.folder, include_defaults=False)
        groups = {*own.all_groups}  # they may name the library's tasks
        if all(name in own.task_index and name not in groups for name in asked.names):
            return own
    return TaskManager(include_path=asked.folder)


def unknown(name: str, known: Sequence[str]) -> UserError:
    """What is said of a name that is none of the known ones."""
    near = difflib.get_close_matches(name, known, n=3)
    fix = f"did you mean {' or '.join(near)}" if near else "`lm_eval ls tasks` lists all names"
    return UserError(TASKS, name, "no task of this name in lm-eval or --tasks-folder", fix)


def _numbered(loaded: Mapping[str, Any]) -> Iterator[Any]:
    """What gets a number of its own: tasks, and in place of their members the groups that have
    one."""
    inside: set[str] = set()
    for group in loaded["groups"].values():
        if group.has_aggregation and group.name not in inside:
            inside |= {task.task_name for task in group.get_all_tasks()}
            inside |= {below.name for below in group.get_all_groups()}
            yield group
    yield from (task for name, task in loaded["tasks"].items() if name not in inside)


def _name(item: Any) -> str:
    return str(getattr(item, "task_name", None) or item.name)


def _leaves(item: Any) -> list[Any]:
    """The tasks of a group, or the task itself."""
    return list(item.get_all_tasks()) if hasattr(item, "get_all_tasks") else [item]


def _sees(task: Any) -> bool:
    return task.get_config("doc_to_image") is not None


def _own_files(folder: str | None) -> list[Path]:
    """The task files of a folder, and the code beside them."""
    kinds = ("*.py", "*.yaml") if folder else ()
    return sorted(file for kind in kinds for file in Path(folder or "").rglob(kind))


def _bytes(value: Any) -> bytes:
    """The same in every process."""
    return json.dumps(value, sort_keys=True, default=_told).encode()


def _told(value: Any) -> Any:
    """What JSON cannot hold: code by its source, since `str` would tell where it lies in memory."""
    if hasattr(value, "tobytes"):  # an image or an array
        kind = getattr(value, "mode", None) or getattr(value, "dtype", None)
        return [str(kind), str(value.size), sha256(value.tobytes()).hexdigest()]
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords]
    if not callable(value):
        return str(value)
    code = value if hasattr(value, "__qualname__") else type(value)
    try:
        return [code.__qualname__, getsource(code)]
    except (TypeError, OSError):  # it was not written in Python
        return [code.__qualname__, code.__module__]


def _metrics(row: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """The library's {"acc,none": …, "acc_stderr,none": …} by metric; a filter of the answers is
    named beside it.
    """
    metrics = {}
    for key, value in row.items():
        metric, comma, chosen = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = row.get(f"{metric}_stderr,{chosen}")
        metrics[metric if chosen == "none" else f"{metric} ({chosen})"] = {
            "value": float(value),
            "stderr": float(error) if isinstance(error, int | float) else None,
        }
    return metrics
