"""The verbs for a person at a terminal; `jobs/` calls the same functions from a Ray job.

Exit codes: 0 done; 1 the run failed (it says where it stopped); 2 the user's mistake (one message:
key, value, fix).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence

from fusegpt_ray.arguments import parser
from fusegpt_ray.errors import GOES_ON, StorageError, UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    arguments = parser().parse_args(argv)
    _quiet()
    try:
        return _COMMANDS[arguments.command](arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        saved = GOES_ON in getattr(stop, "__notes__", ())
        again = f"; {GOES_ON[0].lower()}{GOES_ON[1:-1]}" if saved else arguments.again
        print(f"stopped{again}", file=sys.stderr)
        return 130
    except StorageError as error:
        # No trace: it would show what the store's libraries say, secrets included.
        told = getattr(error, "cause", error)  # raised in a Ray task, it is wrapped in Ray's error
        notes = [note for e in dict.fromkeys((told, error)) for note in getattr(e, "__notes__", ())]
        print(f"failed: {told}", *notes, sep="\n", file=sys.stderr)
        return 1
    except Exception as error:
        traceback.print_exc()  # for whoever mends it; then, for the user, what happened and where
        print(
            f"\nfailed: {type(error).__name__}: {error}",
            *getattr(error, "__notes__", ()),
            sep="\n",
            file=sys.stderr,
        )
        return 1


def _compress(arguments: argparse.Namespace) -> int:
    from fusegpt_ray.recipe import Recipe

    recipe = Recipe.load(arguments.recipe, arguments.set)
    from fusegpt_ray.pipeline import compress  # torch: after the recipe has been checked

    compress(recipe, restart=arguments.restart)
    return 0


def _score(arguments: argparse.Namespace) -> int:
    from fusegpt_ray.recipe import Recipe

    recipe = Recipe.load(arguments.recipe, arguments.set)
    from fusegpt_ray.pipeline import score  # torch: after the recipe has been checked

    result = score(recipe)
    if arguments.json:
        print(json.dumps(result))
    else:
        from rich.console import Console

        from fusegpt_ray.report import score_table
        from fusegpt_ray.text.protocol import described

        Console().print(score_table(result))
        print(described(result))
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from fusegpt_ray.recipe import Recipe
    from fusegpt_ray.sections import Cluster, Evaluation

    text = {"data": arguments.data, "length": arguments.length, "windows": arguments.windows}
    options = {key: vars(arguments)[key] for key in ("config", "split", "column", "bos")}
    text |= {key: value for key, value in options.items() if value}
    text |= {"pack": not arguments.apart, "images": arguments.images}
    try:
        data = Recipe.check(Evaluation, text, "evaluation.data")
        cluster = Recipe.check(
            Cluster, {"engine": arguments.engine, "replicas": arguments.replicas}, "cluster"
        )
        from fusegpt_ray.pipeline import evaluate

        result = evaluate(
            arguments.model,
            data,
            revision=arguments.revision,
            dtype=arguments.dtype,
            cluster=cluster,
        )
    except UserError as error:
        raise UserError(
            _as_argument(error.key), error.value, error.problem, _as_argument(error.fix)
        ) from error
    if arguments.json:
        print(json.dumps(result))
    else:
        from fusegpt_ray.text.protocol import described

        print(f"perplexity {result['perplexity']:.4f}  ({described(result)})")
    return 0


def _pull(arguments: argparse.Namespace) -> int:
    from fusegpt_ray.publishing.download import Incomplete, pull

    try:
        pull(arguments.uri, arguments.folder)
    except Incomplete as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from fusegpt_ray.publishing.verification import verify

    result = verify(arguments.uri)
    if arguments.json:
        print(json.dumps(result))
    else:
        for row in result["problems"]:
            print(f"{row['file']} {row['problem']}")
        for row in result["remarks"]:
            print(f"remark: {row['file']} {row['remark']}")
        if result["good"]:
            print(f"good: {result['model']}, {result['files']} files, {result['bytes']} bytes")
    return 0 if result["good"] else 1


def _clean(arguments: argparse.Namespace) -> int:
    from fusegpt_ray.report import byte_count
    from fusegpt_ray.run import housekeeping

    options = {"age": arguments.age * 60, "unfinished": arguments.unfinished}
    found = housekeeping.leftovers(arguments.uri, **options)
    removed = housekeeping.clean(arguments.uri, **options) if arguments.yes else []
    for item in found:
        goes = "would remove" if item.dead and not arguments.yes else "kept"
        verb = "removed" if item in removed else goes
        print(f"{verb:<12}  {item.uri}  {byte_count(item.size)}  {item.what}")
    dead = [item for item in found if item.dead]
    if dead and not arguments.yes:
        print(
            f"{byte_count(sum(item.size for item in dead))} could go; nothing was removed: that"
            " takes --yes"
        )
    if not found:
        print(f"nothing to remove in {arguments.uri}")
    return 0


def _status(arguments: argparse.Namespace) -> int:
    from fusegpt_ray.run.status import show, status

    result = status(arguments.uri)
    if arguments.json:
        print(json.dumps(result))
    else:
        from rich.console import Console

        show(result, Console())
    return 0


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "compress": _compress,
    "score": _score,
    "evaluate": _evaluate,
    "pull": _pull,
    "verify": _verify,
    "clean": _clean,
    "status": _status,
}


def _as_argument(text: str) -> str:
    """Recipe keys in a message → what `fusegpt evaluate` calls them."""
    text = text.replace("model.source", "MODEL")
    options = "data|length|windows|config|split|column|bos|revision|dtype|replicas"
    return re.sub(rf"\b(?:evaluation\.data|cluster|model)\.({options})\b", r"--\1", text)


def _quiet() -> None:
    """Keep the libraries' progress bars and messages from mixing with our display."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


if __name__ == "__main__":
    sys.exit(main())
