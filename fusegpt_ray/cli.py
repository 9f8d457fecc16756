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
from collections.abc import Sequence

from fusegpt_ray.errors import GOES_ON, StorageError, UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    _quiet()
    try:
        return int(arguments.run(arguments))
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
        told = getattr(error, "cause", error)  # from a Ray task: itself, not Ray's account of it
        notes = [note for e in dict.fromkeys((told, error)) for note in getattr(e, "__notes__", ())]
        print(f"failed: {told}", *notes, sep="\n", file=sys.stderr)
        return 1
    except (
        Exception
    ) as error:  # the last place: the trace for whoever mends it, then what happened and where
        traceback.print_exc()
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
        verb = (
            "removed"
            if item in removed
            else "would remove"
            if item.dead and not arguments.yes
            else "kept"
        )
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


def _as_argument(text: str) -> str:
    """Recipe keys in a message → what `fusegpt evaluate` calls them."""
    text = text.replace("model.source", "MODEL")
    options = "data|length|windows|config|split|column|bos|revision|dtype|replicas"
    return re.sub(rf"\b(?:evaluation\.data|cluster|model)\.({options})\b", r"--\1", text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fusegpt", description="Make GPT-style models shallower by fusing blocks."
    )
    parser.set_defaults(again="")
    verbs = parser.add_subparsers(required=True, metavar="COMMAND")

    verb = verbs.add_parser(
        "compress", help="compress the model of a recipe and publish the result"
    )
    _recipe_arguments(verb)
    verb.add_argument(
        "--restart",
        action="store_true",
        help="forget an unfinished run of this name and begin anew",
    )
    verb.set_defaults(run=_compress)

    verb = verbs.add_parser("score", help="how much each block of the dense model matters")
    _recipe_arguments(verb)
    verb.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    verb.set_defaults(run=_score)

    verb = verbs.add_parser(
        "evaluate", help="perplexity of a model over consecutive windows of a text"
    )
    verb.add_argument("model", metavar="MODEL", help="folder, hub id or URI of a checkpoint")
    data = "file of text or a table of it (path or URI), or a `datasets` id"
    verb.add_argument("--data", required=True, help=data)
    verb.add_argument("--length", type=int, required=True, help="tokens a window")
    verb.add_argument("--windows", type=int, help="only the first so many windows")
    verb.add_argument("--config", help="`datasets` only: the configuration")
    verb.add_argument("--split", help="`datasets` only: the split (default: test)")
    verb.add_argument("--column", help="the column that holds the text (default: text)")
    bos = (
        "whether each window begins with a beginning-of-sequence token; auto: as the tokenizer does"
    )
    verb.add_argument("--bos", default="auto", choices=["auto", "always", "never"], help=bos)
    verb.add_argument("--revision", help="hub models only: branch, tag or commit")
    verb.add_argument(
        "--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="arithmetic"
    )
    verb.add_argument(
        "--engine", default="local", choices=["ray", "local"], help="default: one process, no Ray"
    )
    verb.add_argument(
        "--replicas", type=int, default=1, help="Ray only: replicas that share the windows"
    )
    verb.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    verb.set_defaults(run=_evaluate)

    verb = verbs.add_parser(
        "pull", help="download a published model, checked; run again, it goes on"
    )
    verb.add_argument(
        "uri", metavar="URI", help="folder of a published model, anywhere fsspec reaches"
    )
    verb.add_argument("folder", metavar="DIR", help="local folder; it appears once it is whole")
    verb.set_defaults(run=_pull, again="; the same command goes on with what has arrived")

    verb = verbs.add_parser("verify", help="is a published model what its manifest says?")
    verb.add_argument(
        "uri", metavar="URI", help="folder of a published model, anywhere fsspec reaches"
    )
    verb.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    verb.set_defaults(run=_verify)

    verb = verbs.add_parser("clean", help="list, or remove, what dead runs and pulls left")
    verb.add_argument("uri", metavar="URI", help="an output.uri")
    verb.add_argument(
        "--yes", action="store_true", help="remove what is listed (otherwise nothing is)"
    )
    verb.add_argument("--unfinished", action="store_true", help="dead runs that could go on, too")
    verb.add_argument(
        "--age",
        type=float,
        default=10,
        metavar="MINUTES",
        help="without a sign of life → dead (default: 10)",
    )
    verb.set_defaults(run=_clean)

    verb = verbs.add_parser(
        "status", help="models and runs below an output URI, and what they are at"
    )
    verb.add_argument("uri", metavar="URI", help="an output.uri, or the folder of one run or model")
    verb.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    verb.set_defaults(run=_status)
    return parser


def _recipe_arguments(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("recipe", metavar="RECIPE", help="YAML file; see examples/quickstart.yaml")
    verb.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a field, such as sparsity=0.3",
    )


def _quiet() -> None:
    """Our display is the one display: libraries keep their progress bars and their chatter to
    themselves.
    """
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


if __name__ == "__main__":
    sys.exit(main())
