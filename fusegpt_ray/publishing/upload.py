"""A finished model → a branch of a Hugging Face hub repository, in one commit.

Nothing is sent that does not verify: the whole model is read first, and each file is compared with
its manifest once more when it has been sent, before the one commit that shows them all. What a
branch holds is never replaced by another model.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from fusegpt_ray.errors import StorageError, UserError, first_line
from fusegpt_ray.model.companions import WEIGHTS
from fusegpt_ray.model.hub import quiet
from fusegpt_ray.publishing.verification import verify
from fusegpt_ray.store import storage
from fusegpt_ray.store.manifest import KEY, MANIFEST, Manifest
from fusegpt_ray.store.records import FileRecord
from fusegpt_ray.store.retry import cleaned
from fusegpt_ray.terminal.display import Transfer

MAIN = "main"
REPO = "REPO"
"""What messages call the argument that names a repository."""
TOKEN = "HF_TOKEN"
_BRANCH = re.compile(r"(?!.*(\.\.|//|/\.|\.lock(/|$)))[\w][\w./-]*(?<![./])", re.ASCII)
FROM_MEMORY = 1 << 25
"""Bytes of the largest file that is read whole before it is sent. The hub takes larger ones only
ahead of the commit, so that a copy of one may go when it was sent."""
_HUBS_OWN = {".gitattributes"}
"""What the hub itself puts into a new repository."""
_AGAIN = "run the same command again: what the hub has received is not sent twice"


@dataclass(frozen=True)
class Uploaded:
    """Where a model is on the hub."""

    repo: str
    revision: str
    commit: str
    url: str
    new: bool
    """False: this very model was there already, and nothing was sent."""


@dataclass(frozen=True)
class _Place:
    """A branch as it was found."""

    repo: str
    branch: str
    commit: str | None = None
    """Its last one; None where there is no repository yet."""
    inherited: bool = False
    """The branch is new, or still as `main` is: what it holds is not its own."""
    files: frozenset[str] = frozenset()


def upload(
    uri: str,
    repo: str,
    *,
    private: bool | None = None,
    revision: str = MAIN,
    message: str | None = None,
    display: Callable[[], Transfer] = Transfer,
) -> Uploaded:
    """Send the published model at `uri` (any fsspec URI) to the hub repository `repo`.

    The files of the manifest and the manifest itself, with names instead of the maker's local
    paths, are sent, and nothing else that lies there.
    The token is the one that the hub's own library finds. Run again after a failure, it sends what
    the hub has not received.

    Args:
        repo: owner/name; made if it does not exist.
        private: of a new repository; None: as the owner's account has it. An old one must be so.
        revision: the branch; a new one is made from `main`, and then holds this model alone.
        message: of the commit.

    Raises:
        UserError: a wrong name, no token, no whole model, or the branch holds something else.
        StorageError: the hub or the store failed; the branch is as it was.
    """
    _check_names(repo, revision, message)
    folder = storage.absolute(uri).rstrip("/")
    manifest = Manifest.read(folder).public()
    if pickles := [name for name in manifest.files if _may_be_code(name)]:
        fix = "publish a model that this tool made; it writes safetensors alone"
        raise UserError(KEY, uri, f"lists {pickles[0]!r}: weights, but not safetensors", fix)
    with quiet():
        with _asking(repo):
            hub = _opened()
            place = _look(hub, repo, revision, private)
            url = f"{hub.endpoint}/{repo}" + (f"/tree/{revision}" if revision != MAIN else "")
            if _holds(hub, place, manifest):
                return Uploaded(repo, revision, str(place.commit), url, new=False)
        _check_whole(uri, display())
        with _asking(repo):
            parent = place.commit or _created(hub, place, private)
            if revision != MAIN and (place.inherited or not place.commit):
                hub.create_branch(repo, branch=revision, revision=parent, exist_ok=True)
        with display() as show:
            show.begins(f"sending {folder} to {repo}", len(manifest.files), manifest.size)
            additions = [*_sent(hub, place, folder, manifest, show)]
        added = {MANIFEST, *manifest.files}
        gone = sorted(place.files - added - _HUBS_OWN) if place.inherited else []
        name = folder.rsplit("/", 1)[-1]
        with _asking(repo):
            commit = hub.create_commit(
                repo,
                [*map(CommitOperationDelete, gone), *additions],
                commit_message=message or f"{name}, by fusegpt-ray {version('fusegpt-ray')}",
                revision=revision,
                parent_commit=parent,
            )
            _check_arrived(hub, repo, commit.oid, added)
    return Uploaded(repo, revision, commit.oid, url, new=True)


def _check_arrived(hub: HfApi, repo: str, commit: str, added: Set[str]) -> None:
    """The library leaves out, without a word, what the branch's `.gitignore` names."""
    if missing := sorted(added - _files(hub.model_info(repo, revision=commit))):
        problem = f"the hub left out {missing[0]!r} and perhaps others"
        fix = "remove the branch's .gitignore, or give a repository of its own"
        raise UserError(REPO, repo, problem, fix)


def _check_names(repo: str, branch: str, message: str | None) -> None:
    try:
        validate_repo_id(repo)
        problem = "" if "/" in repo else "names no owner"
    except HFValidationError as error:
        problem = f"not the name of a repository ({first_line(error)})"
    if problem:
        raise UserError(REPO, repo, problem, "give owner/name, such as my-lab/llama-p25")
    if not _BRANCH.fullmatch(branch):
        raise UserError("--revision", branch, "not the name of a branch", "give one such as p25")
    if message is not None and not message.strip():
        raise UserError("--message", message, "is empty", "say something, or leave it out")


def _may_be_code(name: str) -> bool:
    """Whether the file may be weights that run code when they are loaded."""
    return name.lower().endswith(WEIGHTS) and not name.endswith(".safetensors")


def _opened() -> HfApi:
    """The hub, which knows who we are.

    Raises:
        UserError: there is no token, or none that the hub knows.
    """
    fix = f"set {TOKEN} to one of https://huggingface.co/settings/tokens that may write, or run"
    fix += " `hf auth login`"
    if get_token() is None:
        raise UserError(TOKEN, None, "not set, and nobody is logged in to the hub here", fix)
    hub = HfApi(library_name="fusegpt-ray", library_version=version("fusegpt-ray"))
    try:
        hub.whoami()
    except HfHubHTTPError as error:
        if error.response.status_code != 401:
            raise
        raise UserError(TOKEN, "…", "the hub does not accept this token", fix) from error
    return hub


def _look(hub: HfApi, repo: str, branch: str, private: bool | None) -> _Place:
    """The branch as it is.

    Raises:
        UserError: the repository is public and should be private, or the other way round.
    """
    try:
        main = hub.model_info(repo)
    except RepositoryNotFoundError:
        return _Place(repo, branch)
    if private is not None and main.private != private:
        now, option = ("private", "--public") if main.private else ("public", "--private")
        fix = "change it in its settings on the hub, or leave the option out"
        raise UserError(option, repo, f"the repository is there, and is {now}", fix)
    here = main
    if branch != MAIN:
        try:
            here = hub.model_info(repo, revision=branch)
        except RevisionNotFoundError:
            return _Place(repo, branch, main.sha, True, _files(main))
    inherited = branch != MAIN and here.sha == main.sha
    return _Place(repo, branch, here.sha, inherited, _files(here))


def _files(info: ModelInfo) -> frozenset[str]:
    return frozenset(file.rfilename for file in info.siblings or ())


def _holds(hub: HfApi, place: _Place, manifest: Manifest) -> bool:
    """Whether the branch holds this very model, with all its files.

    Raises:
        UserError: it holds something else, of its own.
    """
    if place.inherited or not place.files - _HUBS_OWN:
        return False
    if MANIFEST in place.files:
        with tempfile.TemporaryDirectory() as scratch:
            found = hub.hf_hub_download(
                place.repo, MANIFEST, revision=place.commit, local_dir=scratch
            )
            if Path(found).read_bytes() == manifest.raw:
                return manifest.files.keys() <= place.files
    what = "another model" if MANIFEST in place.files else "files that are not of this model"
    raise UserError(
        REPO,
        place.repo,
        f"its branch {place.branch} holds {what}: {', '.join(sorted(place.files - _HUBS_OWN)[:3])}",
        "give another repository, or a new branch by --revision, such as p25",
    )


def _check_whole(uri: str, show: Transfer) -> None:
    found = verify(uri, show)
    if not found["good"]:
        told = "; ".join(f"{row['file']} {row['problem']}" for row in found["problems"][:3])
        fix = "publish or pull it again; `fusegpt verify` names all that is wrong"
        raise UserError(KEY, uri, f"not what its manifest says: {told}", fix)


def _created(hub: HfApi, place: _Place, private: bool | None) -> str:
    """The first commit of the new repository."""
    hub.create_repo(place.repo, private=private)
    return str(hub.model_info(place.repo).sha)


def _sent(
    hub: HfApi, place: _Place, folder: str, manifest: Manifest, show: Transfer
) -> Iterator[CommitOperationAdd]:
    """The model's files, for a commit; the large ones are on the hub when they are yielded.

    Raises:
        UserError: a file is not what was verified.
    """
    for name, record in manifest.files.items():
        with _content(storage.join(folder, name), record) as content:
            addition = CommitOperationAdd(name, content)
            if not isinstance(content, bytes):
                with _asking(place.repo):
                    hub.preupload_lfs_files(place.repo, [addition], revision=place.branch)
            if addition.upload_info.sha256.hex() != record.sha256:
                problem = f"{name} has changed since it was verified"
                raise UserError(KEY, folder, problem, "let nothing write there, and try again")
        show.at(name, record.size)
        show.ends(name, "is ready")
        yield addition
    yield CommitOperationAdd(MANIFEST, manifest.raw)


@contextmanager
def _content(uri: str, record: FileRecord) -> Iterator[bytes | str]:
    """A small file's bytes; of a large one a local path, which is a copy if it lies elsewhere."""
    if record.size <= FROM_MEMORY:
        yield storage.read(uri)
    elif not storage.is_remote(uri):
        yield storage.filesystem(uri)[1]
    else:
        with tempfile.TemporaryDirectory(prefix="fusegpt-") as scratch:
            copy = os.path.join(scratch, "file")
            storage.download(uri, copy)
            yield copy


@contextmanager
def _asking(repo: str) -> Iterator[None]:
    """Whatever the hub's library raises is one message; none holds the token.

    Raises:
        UserError: the hub refuses what is asked.
        StorageError: it cannot be reached, or fails.
    """
    try:
        yield
    except (UserError, StorageError):
        raise
    except OfflineModeIsEnabled as error:
        problem = "the hub is needed, and may not be reached"
        raise UserError("HF_HUB_OFFLINE", "1", problem, "unset it") from error
    except Exception as error:  # its own, the network's, and those of its helpers
        said = cleaned(first_line(error))  # an address that it uploads to is signed
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        if status is not None and 400 <= status < 500 and status not in (408, 429):
            problem = f"the hub refuses it ({said})"
            fix = "check the name, and that the token may write there"
            raise UserError(REPO, repo, problem, fix) from error
        raise StorageError(f"hf://{repo}", said, _AGAIN) from error
