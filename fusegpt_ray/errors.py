"""Errors with one clear message: a user's mistake (exit code 2), a store that failed for good
(exit code 1), and a budget that is spent (3).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

LONGEST = 500
"""Characters of a value that a message shows."""
GOES_ON = "The same command goes on from what is saved."
"""A note to an exception that ends a run: only where it is true."""


class UserError(ValueError):
    """Something the user can mend: `key` is the recipe key (or argument), `value` what it was,
    `fix` what to do.
    """

    def __init__(self, key: str, value: object, problem: str, fix: str) -> None:
        self.key, self.value, self.problem, self.fix = key, value, problem, fix
        text = repr(value)
        super().__init__(
            f"{key} = {text if len(text) <= LONGEST else text[:LONGEST] + '…'}: {problem}. Fix:"
            f" {fix}."
        )

    def __reduce__(self) -> tuple[type[UserError], tuple[str, object, str, str]]:
        # An exception is pickled by its `args` (the one message) unless told otherwise; Ray sends
        # it between processes.
        return type(self), (self.key, self.value, self.problem, self.fix)


class StorageError(OSError):
    """A store failed for good: the message names the URI and the cause, and `fix` says what to do,
    where that is known.

    Without a `fix` nobody is at fault (an outage, say). No message holds a secret.
    """

    def __init__(self, uri: str, problem: str, fix: str = "") -> None:
        self.uri, self.problem, self.fix = uri, problem, fix
        super().__init__(f"{uri}: {problem.rstrip('.')}." + (f" Fix: {fix}." if fix else ""))

    def __reduce__(self) -> tuple[type[StorageError], tuple[str, str, str]]:
        return type(self), (self.uri, self.problem, self.fix)


class Terminated(KeyboardInterrupt):
    """SIGTERM came: the process stops as after Ctrl-C, with exit code 143."""


class BudgetSpent(Exception):
    """A run stopped because `cluster.max_hours` or `cluster.max_cost` is spent (exit code 3). The
    message says what was spent, where that is kept, and how to go on.
    """


class PutOff(Exception):
    """All that is left of a run is to publish, which will be done later, on other workers."""


def reason(error: BaseException) -> str:
    """What went wrong, in short: for a message that names the file itself."""
    return error.problem if isinstance(error, StorageError) else f"{type(error).__name__}: {error}"


def first_line(error: BaseException) -> str:
    """What a library says went wrong, in one line of at most 300 characters."""
    first, _, rest = str(error).strip().partition("\n")
    text = first.strip()
    if text.endswith(":"):  # a heading: what it announces is the news
        text = f"{text} {rest.strip().partition(chr(10))[0].strip()}"
    return f"{text.strip() or type(error).__name__}"[:300]


@contextmanager
def reading_users_file(
    key: str, value: object, problem: str, fix: str, copy: str = ""
) -> Iterator[None]:
    """While a library reads or builds from a file of the user's: whatever it raises is one message.

    No list of exception types: what a file holds decides how a library fails. The library's own
    reason stands in the message, and the exception stays its cause. Where the library reads a
    `copy` (a temporary path), the message names the user's own place instead, which is `value`.

    Raises:
        UserError: the block raised anything but a UserError or a StorageError, which pass.
    """
    try:
        yield
    except (UserError, StorageError):
        raise
    except Exception as error:
        said = first_line(error)
        if copy:
            said = said.replace(copy, str(value))
        raise UserError(key, value, f"{problem} ({said})", fix) from error


@contextmanager
def blaming(key: str, value: object) -> Iterator[None]:
    """Before a run begins: a store's failure that the user can mend is a mistake in this recipe
    key.
    """
    try:
        yield
    except StorageError as error:
        if not error.fix:
            raise
        raise UserError(key, value, error.problem, error.fix) from error
