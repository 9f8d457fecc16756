"""A finished round, where its record lies, and which files are needed of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from fusegpt_ray.errors import UserError
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.store import storage
from fusegpt_ray.store.records import DamagedRecord, FileRecord, opened


@dataclass(frozen=True)
class Done:
    """A round that is finished."""

    record: Mapping[str, Any]
    """What the manifest says about it."""
    stack: Stack
    """The model after it."""
    files: Mapping[str, FileRecord]
    """What it wrote, by URI."""

    def to_json(self) -> dict[str, Any]:
        files = {uri: file.to_json() for uri, file in self.files.items()}
        return {"round": dict(self.record), "stack": self.stack.to_json(), "files": files}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        files = {uri: FileRecord.from_json(file) for uri, file in data["files"].items()}
        return cls(data["round"], Stack.from_json(data["stack"]), files)


def moved(rounds: Sequence[Done], healed: Done | None) -> dict[str, dict[str, int]]:
    """Bytes of blocks by stage: {"read", "written"} by all processes together."""

    def read(done: Sequence[Done], key: str) -> int:
        return sum(one.record.get(key) or 0 for one in done)

    def written(done: Sequence[Done]) -> int:
        return sum(file.size for one in done for file in one.files.values())

    found = {
        "scoring": {"read": read(rounds, "bytes_read"), "written": 0},
        "states": {"read": read(rounds, "states_bytes_read"), "written": 0},
        "fine-tuning": {"read": 0, "written": written(rounds)},
    }
    if healed:
        ended = [healed]
        both = {"read": read(ended, "states_bytes_read"), "written": written(ended)}
        found["healing"] = both
    return found


def record_file(folder: str, number: int) -> str:
    """Of a round, in the run's folder."""
    return storage.join(folder, f"round-{number:03d}.json")


def numbers(folder: str) -> list[int]:
    """Of the rounds that have a record, in order."""
    names = [name for name in storage.names(folder) if name.startswith("round-")]
    return sorted(int(name.removeprefix("round-").removesuffix(".json")) for name in names)


def records(folder: str) -> tuple[list[Done], str]:
    """The records that can be read, from the first on, and what is wrong with the next one."""
    done: list[Done] = []
    for number in numbers(folder):
        if number != len(done) + 1:
            return done, f"{record_file(folder, len(done) + 1)} is missing"
        try:
            done.append(Done.from_json(opened(storage.read(record_file(folder, number)))))
        except DamagedRecord as error:
            return done, f"{record_file(folder, number)} is damaged ({error})"
    return done, ""


def needed_files(done: Sequence[Done], numbers: Collection[int]) -> set[str]:
    """All files that the models after these rounds point at, as far as the rounds are done."""
    stacks = [done[number - 1].stack for number in numbers if 0 < number <= len(done)]
    return {uri for stack in stacks for uri in _files(stack)}


def _files(stack: Stack) -> set[str]:
    """All files a stack points at."""
    refs = [*stack.refs]  # also the trunk's, which is a round's own where it changed the width
    for block in stack.blocks:
        if block.terms:
            refs += [
                ref
                for part in (
                    block.terms.base,
                    block.terms.learned,
                    *(donor.weights for donor in block.terms.donors),
                )
                for ref in part.values()
            ]
    return {ref.file for ref in refs}


def let_go_of(uri: str, done: int) -> UserError:
    """What to say of a file that a model after an earlier round needs and that is gone. Rounds that
    are good are not done again because of one more model.
    """
    problem = (
        f"{done} rounds are done, and {uri.rsplit('/', 1)[-1]}, which a model after an earlier one "
        "is made of, is gone: of earlier rounds a run keeps only what was asked for"
    )
    fix = "ask for what was asked for before, use another output.name, or begin anew with --restart"
    return UserError("sparsity", None, problem, fix)
