"""Ranges of files, read straight into the memory that they are meant for.

- Neighbouring ranges of a file are read at once, and large ones in pieces, several at a time.
- The kernel writes a local file's bytes where they belong; those of an object store arrive as
  `bytes` of one piece and are copied there. A piece that fails is read again, not the others.
- Nothing is mapped: a mapped file that shrinks, or a disk that fails, ends the process by SIGBUS.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Self

import torch

from fusegpt_ray.store.filesystem import filesystem
from fusegpt_ray.store.retry import with_retries

PIECE = 1 << 24
"""Bytes that one thread reads at once."""
THREADS = 8
"""Enough for the page cache, for a disk that wants several requests at a time, and for a store
whose answers take their time."""
MEMORIES = 1000
"""Of one piece at most; Linux takes 1024 in a call."""
HUGE = 1 << 22
"""Bytes from which on memory is asked for in huge pages of (mostly) 2 MiB."""


class EndedEarly(OSError):
    """A file ended before all that was to be read of it."""


@dataclass(frozen=True, slots=True)
class Range:
    """Bytes of a file from `begin` on, as many as `memory` takes: writable bytes without gaps."""

    uri: str
    begin: int
    memory: memoryview


@dataclass(slots=True)
class _Piece:
    """Neighbouring bytes of a file, and where they go, in order."""

    uri: str
    begin: int
    end: int
    memories: list[memoryview] = field(default_factory=list)


def empty(size: int) -> torch.Tensor:
    """Uninitialised bytes on the CPU: [size] uint8.

    Most of the time of reading into new memory goes into the kernel's giving it, page by page. So
    much of it is asked for in huge pages, where the system leaves that to programs.
    """
    memory = torch.empty(size, dtype=torch.uint8)
    if size >= HUGE and _madvise is not None:
        begin = -(-memory.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        pages = (memory.data_ptr() + size - begin) // mmap.PAGESIZE
        _madvise(begin, pages * mmap.PAGESIZE, mmap.MADV_HUGEPAGE)  # advice: it may be refused
    return memory


def _find_madvise() -> Callable[[int, int, int], int] | None:
    """The C library's, where it has huge pages. Python's own is for memory of `mmap` only."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


_madvise = _find_madvise()


def memory_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, to be read or written."""
    return tensor.view(-1).view(torch.uint8).numpy().data


class Reader:
    """Threads that read ranges; they end with the `with` block."""

    def __enter__(self) -> Self:
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="read")
        return self

    def __exit__(self, *_: object) -> None:
        """Waits for the reads under way, so that nothing is written into memory after that."""
        self._threads.shutdown(cancel_futures=True)

    def start(self, ranges: Iterable[Range]) -> Iterator[memoryview]:
        """Begin to read now; gives the ranges' bytes in order, whenever the next ones are there.

        Raises:
            OSError: as the file's store raises it, among them `EndedEarly`. Raised by the iterator.
        """
        readers: dict[str, Callable[[_Piece], None]] = {}
        pending: list[tuple[_Piece, Future[None]]] = []
        for piece in _pieces(ranges):
            if piece.uri not in readers:
                # Asked for here: some file systems are made anew for every thread that asks.
                readers[piece.uri] = _reader(piece.uri)
            pending.append((piece, self._threads.submit(readers[piece.uri], piece)))
        return _arriving(pending)


def _arriving(pending: list[tuple[_Piece, Future[None]]]) -> Iterator[memoryview]:
    for piece, future in pending:
        future.result()
        yield from piece.memories


def _pieces(ranges: Iterable[Range]) -> Iterator[_Piece]:
    """The ranges in order, neighbours together and large ones in parts; none is empty."""
    piece = None
    for part in ranges:
        done = 0
        while done < len(part.memory):
            begin = part.begin + done
            if piece is not None and (
                (piece.uri, piece.end) != (part.uri, begin)
                or piece.end - piece.begin == PIECE
                or len(piece.memories) == MEMORIES
            ):
                yield piece
                piece = None
            piece = piece or _Piece(part.uri, begin, begin)
            memory = part.memory[done : done + PIECE - (piece.end - piece.begin)]
            piece.memories.append(memory)
            piece.end += len(memory)
            done += len(memory)
    if piece is not None:
        yield piece


def _reader(uri: str) -> Callable[[_Piece], None]:
    """What reads pieces of this file."""
    fs, path = filesystem(uri)
    if "file" in fs.protocol:
        return lambda piece: with_retries(uri, partial(_read_local, path, piece))
    return lambda piece: _place(
        piece, with_retries(uri, lambda: fs.cat_file(path, start=piece.begin, end=piece.end))
    )


def _place(piece: _Piece, data: bytes) -> None:
    if len(data) != piece.end - piece.begin:
        raise _ended(piece, piece.begin + len(data))
    whole, at = memoryview(data), 0
    for memory in piece.memories:
        memory[:] = whole[at : at + len(memory)]
        at += len(memory)


def _read_local(path: str, piece: _Piece) -> None:
    at, left = piece.begin, list(piece.memories)
    file = os.open(path, os.O_RDONLY)
    try:
        while left:
            got = os.preadv(file, left, at)
            if got == 0:
                raise _ended(piece, at)
            at += got
            while left and got >= len(left[0]):
                got -= len(left.pop(0))
            if got:
                left[0] = left[0][got:]
    finally:
        os.close(file)


def _ended(piece: _Piece, at: int) -> EndedEarly:
    return EndedEarly(
        f"{piece.uri} ended early: after {at} bytes, while its bytes up to {piece.end} were read"
    )
