"""A user's mistake: the message names the key, the value and the fix (the command line ends with exit code 2)."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user can mend: `key` is the recipe key (or argument), `value` what it was, `fix` what to do."""

    def __init__(self, key: str, value: object, problem: str, fix: str) -> None:
        self.key, self.value, self.problem, self.fix = key, value, problem, fix
        super().__init__(f"{key} = {value!r}: {problem}. Fix: {fix}.")

    def __reduce__(self) -> tuple[type[UserError], tuple[str, object, str, str]]:
        # An exception is pickled by its `args` (the one message) unless told otherwise; Ray sends it between processes.
        return type(self), (self.key, self.value, self.problem, self.fix)
