"""A published model → a local folder: in parallel, resumable, every byte checked against the
manifest.

Notable: all is done in `DIR.part`, a sibling that is renamed to `DIR` once whole. Its files are
opened by name relative to the opened folder and never through a link, and the names come from a
manifest that was checked first, so nothing is written anywhere else.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import stat
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from io import BufferedRandom
from pathlib import Path, PurePosixPath

from fusegpt_ray.errors import UserError, reason
from fusegpt_ray.store import storage
from fusegpt_ray.store.manifest import MANIFEST, PULLING, Manifest
from fusegpt_ray.store.records import FileRecord, damage
from fusegpt_ray.terminal.display import Transfer, byte_count

WORKERS = 8
CHUNK = 1 << 24
"""Bytes a request."""
TRIES = 3
"""How often a file that arrives damaged, or not, is fetched."""
PAUSE = 1.0
"""Seconds before the second try; twice as many before each further one."""
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


class Incomplete(OSError):
    """Some files could not be fetched whole: `files` says what is wrong with each, by name."""

    def __init__(self, part: Path, files: dict[str, str]) -> None:
        self.files = files
        lines = [f"{name} {problem}" for name, problem in files.items()]
        lines.append(
            f"{len(files)} files failed {TRIES} times; the whole ones are kept in {part}, the same"
            " command fetches the rest"
        )
        super().__init__("\n".join(lines))


def pull(uri: str, folder: str | os.PathLike[str], display: Transfer | None = None) -> Path:
    """Download the model at `uri` (any fsspec URI) to `folder`, which appears only once it is
    whole; returns its path.

    Run again after a failure, it goes on with what has arrived.

    Raises:
        UserError: there is no model, its manifest cannot be trusted, or `folder` is something else.
        Incomplete: files that arrive damaged, or not at all, again and again.
    """
    if "://" in str(folder):
        raise UserError("DIR", str(folder), "not a local path", "give a folder on this machine")
    source, target = (
        storage.absolute(uri).rstrip("/"),
        Path(os.path.abspath(os.path.expanduser(folder))),
    )
    manifest = Manifest.read(source)
    with display or Transfer() as show:
        if target.is_dir() and any(target.iterdir()):
            _check_same(target, manifest)
            show.say(f"{target} is this model already, and whole")
            return target
        if target.is_symlink() or (target.exists() and not target.is_dir()):
            raise UserError(
                "DIR",
                str(target),
                "a file or a link, not a folder",
                "give a new folder, or remove it",
            )
        part = target.with_name(f"{target.name}.part")
        with _opened(part) as directory:
            _make_room(directory, part, manifest)
            show.begins(f"pulling {source}", len(manifest.files), manifest.size)
            failed = _Pull(source, directory, manifest, show).all()
            if failed:
                raise Incomplete(part, failed)
            with _open(directory, MANIFEST) as file:
                file.write(manifest.raw)
                file.flush()
                os.fsync(file.fileno())
            os.unlink(PULLING, dir_fd=directory)
            os.fsync(directory)
            part.rename(target)
        show.say(f"pulled {target}")
    return target


def _check_same(target: Path, manifest: Manifest) -> None:
    fix = "give another folder, or remove this one"
    mine = target / MANIFEST
    if not mine.is_file() or mine.read_bytes() != manifest.raw:
        raise UserError("DIR", str(target), "exists, is not empty and is not this model", fix)
    for name, record in manifest.files.items():
        if problem := damage(str(target / name), record):
            raise UserError(
                "DIR", str(target), f"exists and is this model, but {name} {problem}", fix
            )


@contextmanager
def _opened(part: Path) -> Iterator[int]:
    """The folder the files arrive in, opened, and locked as long as this process lives.

    Raises:
        UserError: another pull fills it, or it is something else.
    """
    with ExitStack() as opened:
        try:
            part.parent.mkdir(parents=True, exist_ok=True)
            part.mkdir(exist_ok=True)
            directory = os.open(part, _FOLDER)
            opened.callback(os.close, directory)
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            fix = "wait for it, or give another folder"
            raise UserError("DIR", str(part), "another pull is filling it", fix) from error
        except OSError as error:
            fix = "remove what is in the way, check your rights, or give another folder"
            raise UserError(
                "DIR", str(part), f"cannot be made or used ({error.strerror})", fix
            ) from error
        yield directory


def _make_room(directory: int, part: Path, manifest: Manifest) -> None:
    """Leave in the folder only what an earlier pull of these files may have begun.

    Raises:
        UserError: what is there is not from a pull; or the disk is too small.
    """
    found = dict(_walk(directory))
    files = {name: info for name, info in found.items() if not stat.S_ISDIR(info.st_mode)}
    folders = {str(above) for name in manifest.files for above in PurePosixPath(name).parents}
    strange = [
        name for name, info in files.items() if not stat.S_ISREG(info.st_mode) or info.st_nlink > 1
    ]
    strange += sorted(found.keys() - files.keys() - folders)
    if found and not {PULLING, MANIFEST} & files.keys():
        strange = [*found]
    if strange:
        fix = "look at it, then remove the folder, or give another one"
        raise UserError(
            "DIR", str(part), f"in the way: a pull never made {min(strange)!r} there", fix
        )
    there = sum(info.st_size for name, info in files.items() if name in manifest.files)
    free = shutil.disk_usage(directory).free
    if manifest.size - there > free:
        problem = f"the model has {byte_count(manifest.size)}, {byte_count(free)} are free there"
        raise UserError("DIR", str(part), problem, "make room, or give a folder on another disk")
    with _open(directory, PULLING):
        pass
    for name in files.keys() - manifest.files.keys() - {PULLING}:  # of another version of the model
        with _parent(directory, name) as folder:
            os.unlink(name.rpartition("/")[2], dir_fd=folder)


def _walk(directory: int) -> Iterator[tuple[str, os.stat_result]]:
    """Everything below an opened folder, by path; links are not followed."""
    for folder, folders, files, opened in os.fwalk(".", dir_fd=directory):
        for name in (*folders, *files):
            info = os.stat(name, dir_fd=opened, follow_symlinks=False)
            yield os.path.normpath(f"{folder}/{name}"), info


@contextmanager
def _parent(directory: int, path: str) -> Iterator[int]:
    """The folder that a file lies in, below the opened one, made if need be; never through a
    link.
    """
    with ExitStack() as opened:
        for name in path.split("/")[:-1]:
            with suppress(FileExistsError):
                os.mkdir(name, dir_fd=directory)
            directory = os.open(name, _FOLDER, dir_fd=directory)
            opened.callback(os.close, directory)
        yield directory


def _open(directory: int, path: str) -> BufferedRandom:
    """A file below the folder, made if need be, for reading and writing; never through a link."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    with _parent(directory, path) as folder:
        name = path.rpartition("/")[2]
        return open(path, "r+b", opener=lambda *_: os.open(name, flags, 0o666, dir_fd=folder))


@dataclass
class _Pull:
    """The files of one model on their way."""

    source: str
    directory: int
    manifest: Manifest
    show: Transfer
    stop: threading.Event = field(default_factory=threading.Event)

    def all(self) -> dict[str, str]:
        """Fetch what is not there yet; what is wrong with the files that could not be fetched, by
        name.
        """
        with ThreadPoolExecutor(WORKERS) as pool:
            try:
                problems = list(pool.map(self.one, self.manifest.files))
            except BaseException:
                self.stop.set()
                raise
        return {
            name: problem
            for name, problem in zip(self.manifest.files, problems, strict=True)
            if problem
        }

    def one(self, name: str) -> str:
        """What is wrong with a file in the end, or nothing."""
        problem = ""
        for attempt in range(TRIES):
            if attempt:
                self.show.say(f"{name} {problem}; fetching it again")
                self.stop.wait(PAUSE * 2 ** (attempt - 1))
            if self.stop.is_set():
                return "was not fetched"
            problem = self._once(name, self.manifest.files[name])
            if not problem:
                break
        self.show.ends(name, problem or "is whole")
        return problem

    def _once(self, name: str, record: FileRecord) -> str:
        uri = storage.join(self.source, name)
        with _open(self.directory, name) as file:
            at = file.seek(0, os.SEEK_END)  # what an earlier try has written
            self.show.at(name, at)
            while at < record.size:
                if self.stop.is_set():
                    return "was not fetched"
                end = min(at + CHUNK, record.size)
                try:
                    (data,) = storage.read_ranges(uri, [(at, end)])
                except (
                    Exception
                ) as error:  # whatever a store raises, botocore's and aiohttp's own kinds among it
                    return f"cannot be read ({reason(error)})"
                if len(data) != end - at:
                    return f"ended early: {at + len(data)} bytes of {record.size}"
                file.write(data)
                file.flush()  # so that a kill loses only the piece that is on its way
                at = end
                self.show.at(name, at)
            file.seek(0)
            if hashlib.file_digest(file, "sha256").hexdigest() != record.sha256:
                file.truncate(0)
                return "arrived with another checksum than the manifest says"
            os.fsync(file.fileno())
        return ""
