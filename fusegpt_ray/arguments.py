"""The arguments of each command, with their help."""

from __future__ import annotations

import argparse
from typing import TypeAlias

_Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
_PUBLISHED = "folder of a published model, anywhere fsspec reaches"


def parser() -> argparse.ArgumentParser:
    """Parses into `command`, its arguments, and `again`: what to say where it is stopped."""
    top = argparse.ArgumentParser(
        prog="fusegpt", description="Make GPT-style models shallower by fusing blocks."
    )
    top.set_defaults(again="")
    verbs = top.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for add in (
        _add_compress,
        _add_score,
        _add_evaluate,
        _add_pull,
        _add_verify,
        _add_clean,
        _add_status,
    ):
        add(verbs)
    return top


def _add_compress(verbs: _Verbs) -> None:
    verb = verbs.add_parser(
        "compress", help="compress the model of a recipe and publish the result"
    )
    _recipe_arguments(verb)
    verb.add_argument(
        "--restart",
        action="store_true",
        help="forget an unfinished run of this name and begin anew",
    )


def _add_score(verbs: _Verbs) -> None:
    verb = verbs.add_parser("score", help="how much each block of the dense model matters")
    _recipe_arguments(verb)
    _json_argument(verb)


def _add_evaluate(verbs: _Verbs) -> None:
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
    apart = "each row, or file of plain text, is a window of its own"
    verb.add_argument("--apart", action="store_true", help=apart)
    images = "rows are conversations with images; the perplexity is that of the answers"
    verb.add_argument("--images", action="store_true", help=images)
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
    _json_argument(verb)


def _add_pull(verbs: _Verbs) -> None:
    verb = verbs.add_parser(
        "pull", help="download a published model, checked; run again, it goes on"
    )
    verb.add_argument("uri", metavar="URI", help=_PUBLISHED)
    verb.add_argument("folder", metavar="DIR", help="local folder; it appears once it is whole")
    verb.set_defaults(again="; the same command goes on with what has arrived")


def _add_verify(verbs: _Verbs) -> None:
    verb = verbs.add_parser("verify", help="is a published model what its manifest says?")
    verb.add_argument("uri", metavar="URI", help=_PUBLISHED)
    _json_argument(verb)


def _add_clean(verbs: _Verbs) -> None:
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


def _add_status(verbs: _Verbs) -> None:
    verb = verbs.add_parser(
        "status", help="models and runs below an output URI, and what they are doing"
    )
    verb.add_argument("uri", metavar="URI", help="an output.uri, or the folder of one run or model")
    _json_argument(verb)


def _recipe_arguments(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("recipe", metavar="RECIPE", help="YAML file; see examples/quickstart.yaml")
    verb.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a field, such as sparsity=0.3",
    )


def _json_argument(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--json", action="store_true", help="print one JSON object on stdout")
