"""The verbs for a person at a terminal; `jobs/` calls the same functions from a Ray job.

Exit codes: 0 done; 1 the run failed (it says where it stopped); 2 the user's mistake (one message:
key, value, fix); 3 the run stopped because its budget is spent; 130 stopped by Ctrl-C, 143 by
SIGTERM.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Mapping, Sequence

import click
from click.shell_completion import shell_complete

from fusegpt_ray.commands.compare import compare
from fusegpt_ray.commands.compress import compress
from fusegpt_ray.commands.family import family
from fusegpt_ray.commands.keys import keys
from fusegpt_ray.commands.measure import evaluate, score
from fusegpt_ray.commands.options import say_outcome
from fusegpt_ray.commands.planning import init, plan, validate
from fusegpt_ray.commands.published import publish, pull, verify
from fusegpt_ray.commands.report import report
from fusegpt_ray.commands.runs import clean, status
from fusegpt_ray.commands.speed import speed
from fusegpt_ray.commands.tasks import tasks
from fusegpt_ray.errors import BudgetSpent, StorageError, Terminated, UserError
from fusegpt_ray.termination import sigterm_stops

VERBS: Mapping[str, tuple[click.Command, ...]] = {
    "Make models": (init, keys, validate, plan, compress, compare, family),
    "Look into models": (score, evaluate, tasks, speed),
    "Use what was published": (pull, verify, publish),
    "Follow runs and tidy up": (status, report, clean),
}
"""In the order of the help."""
COMPLETE = "_FUSEGPT_COMPLETE"
"""The variable by which a shell asks what a word may become."""


class _Verbs(click.Group):
    """The help groups the verbs by what one wants."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        widest = max(map(len, self.commands))
        for title, verbs in VERBS.items():
            with formatter.section(title):
                formatter.write_dl(
                    [(f"{verb.name:<{widest}}", verb.get_short_help_str(200)) for verb in verbs]
                )


@click.group(
    cls=_Verbs,
    commands=[verb for verbs in VERBS.values() for verb in verbs],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    subcommand_metavar="COMMAND …",
    epilog="fusegpt COMMAND --help tells more of one. Tab completion in bash: "
    'eval "$(_FUSEGPT_COMPLETE=bash_source fusegpt)"; zsh_source and fish_source likewise.',
)
@click.version_option(package_name="fusegpt-ray", prog_name="fusegpt")
def app() -> None:
    """Make GPT-style models shallower by fusing blocks."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    if asked := os.environ.get(COMPLETE):
        return shell_complete(app, {}, "fusegpt", COMPLETE, asked)
    _quiet()
    try:
        # Not `app.main`, which takes an EOFError of ours for Ctrl-C.
        with (
            sigterm_stops(),
            app.make_context("fusegpt", list(sys.argv[1:] if argv is None else argv)) as context,
        ):
            app.invoke(context)
        return 0
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.ClickException as error:
        _show_misuse(error)
        return error.exit_code
    except UserError as error:
        say_outcome("error:", error)
        return 2
    except BudgetSpent as spent:
        say_outcome("stopped:", spent)
        return 3
    except KeyboardInterrupt as stop:
        notes = [f"; {note[0].lower()}{note[1:-1]}" for note in getattr(stop, "__notes__", ())]
        click.echo("".join(["stopped", *dict.fromkeys(notes)]), err=True)
        return 143 if isinstance(stop, Terminated) else 130
    except StorageError as error:
        # No trace: it would show what the store's libraries say, secrets included.
        told = getattr(error, "cause", error)  # raised in a Ray task, it is wrapped in Ray's error
        notes = [note for e in dict.fromkeys((told, error)) for note in getattr(e, "__notes__", ())]
        say_outcome("failed:", told, *notes)
        return 1
    except Exception as error:
        traceback.print_exc()  # for whoever mends it; then, for the user, what happened and where
        click.echo(err=True)
        say_outcome("failed:", f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ()))
        return 1


def _show_misuse(error: click.ClickException) -> None:
    """A wrong command line: as click has it, in the words and colours of all other errors."""
    if context := getattr(error, "ctx", None):
        usage, path = context.get_usage(), context.command_path
        click.echo(f"{usage}\nTry '{path} --help' for help.\n", err=True)
    say_outcome("error:", error.format_message())


def _quiet() -> None:
    """Keep the libraries' progress bars and messages from mixing with our display."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


if __name__ == "__main__":
    sys.exit(main())
