"""A model that is measured as anybody would use it: by plain `from_pretrained`, from a folder of
this machine.
"""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fusegpt_ray.errors import StorageError, UserError, reading_users_file
from fusegpt_ray.model.companions import CONFIG
from fusegpt_ray.model.config import QuantizedError, auto_class
from fusegpt_ray.model.memory import is_out_of_memory
from fusegpt_ray.model.source import Source
from fusegpt_ray.publishing import plain
from fusegpt_ray.publishing.download import Incomplete, pull
from fusegpt_ray.run.identity import file_mark
from fusegpt_ray.store import storage
from fusegpt_ray.store.checkpoint import INDEX, SINGLE, TensorRef, read_index
from fusegpt_ray.store.manifest import MANIFEST, Manifest
from fusegpt_ray.store.threads import at_once
from fusegpt_ray.terminal.display import Transfer
from fusegpt_ray.uris import refuse_secret

KEY = "MODEL"
"""What messages call the argument that names a model."""
_UNQUANTIZED = (
    "measure the checkpoint that it was made from; on tasks, lm-eval itself measures quantized ones"
    " (lm_eval --model hf), and on speed whatever serves them"
)
"""The fix for a quantized checkpoint, which loads only with its quantizer's own library."""


@dataclass(frozen=True)
class Checkpoint:
    """A model whose files have been looked at, weights by their headers alone."""

    source: Source
    config: Mapping[str, Any]
    """config.json as it is."""
    weights: tuple[str, ...]
    """Names of the files that hold tensors, and of the index of several."""
    elements: int
    """Of all tensors together."""
    dtype: str
    """In which most bytes are stored: "bfloat16"."""

    @classmethod
    def open(cls, name: str) -> Checkpoint:
        """A local folder, a hub id (which is downloaded to the hub's cache) or an fsspec URI.

        Raises:
            UserError: see `Source.find`, `Source.config` and `read_index`; or the URI holds a
                secret.
        """
        refuse_secret(KEY, name)
        try:
            source = Source.find(name, None, KEY)
            config = source.config(KEY)
            source.fetch()
            tensors = read_index(source.folder, KEY).values()
        except UserError as error:
            key, fix = (text.replace("model.source", KEY) for text in (error.key, error.fix))
            if isinstance(error, QuantizedError):
                fix = _UNQUANTIZED
            raise UserError(key, error.value, error.problem, fix) from error
        names = {ref.file.rsplit("/", 1)[-1] for ref in tensors}
        if names != {SINGLE}:
            names.add(INDEX)
        elements = sum(math.prod(ref.shape) for ref in tensors)
        return cls(source, config, tuple(sorted(names)), elements, _main_dtype([*tensors]))

    def arithmetic(self, asked: str) -> str:
        """The dtype to compute in; "auto": as it is stored."""
        return self.dtype if asked == "auto" else asked

    def weights_bytes(self, asked: str) -> int:
        """What the weights take of memory in the dtype of the arithmetic."""
        dtype: torch.dtype = getattr(torch, self.arithmetic(asked))
        return self.elements * dtype.itemsize

    @property
    def name(self) -> str:
        """As the user says it."""
        return self.source.name

    @property
    def files(self) -> tuple[str, ...]:
        """Paths of all files that loaders may read."""
        return tuple(sorted({CONFIG, *self.weights, *self.source.small_files}))

    def identity(self) -> dict[str, str]:
        """What changes with each file's bytes, by the file's path.

        Of a published model at a URI the manifest tells it (`local` checks that it is true), and
        of what the hub's cache holds the hub; other local files are read.

        Raises:
            UserError: see `local`.
        """
        folder, published = self._reached(), self._manifest
        told = published.files if published else {}

        def mark(name: str) -> str:
            known = told.get(name)
            return f"sha256 {known.sha256}" if known else file_mark(storage.join(folder, name))

        return dict(zip(self.files, at_once(mark, self.files), strict=True))

    def _reached(self) -> str:
        """The folder, with a hub model's files, also on a node that did not have them."""
        folder = self.source.folder
        self.source.fetch()
        if "://" not in folder and not Path(folder).is_dir():
            fix = "use object storage, or a folder that all nodes share"
            raise UserError(KEY, self.name, "a node of the cluster does not have it", fix)
        return folder

    @property
    def _manifest(self) -> Manifest | None:
        """Of a published model at a URI."""
        folder = self.source.folder
        if "://" not in folder or not storage.exists(storage.join(folder, MANIFEST)):
            return None
        return Manifest.read(folder)

    @contextmanager
    def local(self) -> Iterator[str]:
        """A folder of this machine with all files. What lies at a URI is downloaded to the
        temporary folder for as long as the block lasts, a published model with all checksums.

        Raises:
            UserError: another node has the folder, this one has not.
            StorageError: files do not arrive whole.
        """
        folder = self._reached()
        if "://" not in folder:
            yield folder
            return
        with tempfile.TemporaryDirectory(prefix="fusegpt-model-") as place:
            target = Path(place) / "model"
            if self._manifest:
                try:
                    pull(folder, target, Transfer(Console(stderr=True, quiet=True)))
                except Incomplete as error:
                    raise StorageError(folder, str(error)) from error
            else:
                for name in self.files:
                    (target / name).parent.mkdir(parents=True, exist_ok=True)
                for _ in at_once(
                    lambda name: storage.download(storage.join(folder, name), str(target / name)),
                    self.files,
                ):
                    pass
            yield str(target)


def load(checkpoint: Checkpoint, folder: str, dtype: str, device: torch.device) -> Any:
    """The model by plain `from_pretrained`, ready to compute; code of its own is never run.

    Raises:
        UserError: transformers does not load it, or not all of it, or memory runs out.
    """
    key, name = KEY, checkpoint.name
    fix = "give a language model that from_pretrained loads"
    with reading_users_file(key, name, "transformers does not load it", fix, folder):
        try:
            auto = auto_class(checkpoint.config)
            model, report = plain.load(folder, auto, getattr(torch, dtype))
            model = model.eval().to(device)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            fix = "use --dtype bfloat16 or a larger machine"
            raise UserError(key, name, "memory runs out", fix) from error
    if problem := plain.incomplete(report):
        raise UserError(key, name, problem, "download the checkpoint again")
    return model


def short_names(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """The last part of each name, if that tells them apart; else the whole names."""
    last = [checkpoint.name.rstrip("/").rsplit("/", 1)[-1] for checkpoint in checkpoints]
    return last if len({*last}) == len(last) else [checkpoint.name for checkpoint in checkpoints]


def _main_dtype(tensors: Sequence[TensorRef]) -> str:
    sizes: Counter[str] = Counter()
    for ref in tensors:
        sizes[str(ref.dtype).removeprefix("torch.")] += ref.end - ref.begin
    return sizes.most_common(1)[0][0]
