"""A process that reads blocks through the node's cache, and says of each what it read.

    python readers.py FOLDER REFS [half|whole]

REFS: a JSON file, the named tensors of each block. It says `ready`, begins at the first line of its
standard input, and says the digest of each block. With `half` or `whole` it hangs when so much of
the first block's file is written, and says `hanging`.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from pathlib import Path
from typing import BinaryIO

from fusegpt_ray.model.cache import BlockCache
from fusegpt_ray.model.stack import Refs
from fusegpt_ray.store.checkpoint import TensorRef


def digest_of(refs: Refs, cache: BlockCache) -> str:
    tensors = cache.tensors(refs)
    return hashlib.sha256(
        b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))
    ).hexdigest()


def _hang(share: float) -> None:
    def keep(self: BlockCache, key: str, part: BinaryIO, data: list[bytes]) -> Path:
        whole = b"".join(data)
        part.write(whole[: int(len(whole) * share)])
        part.flush()
        print("hanging", flush=True)
        time.sleep(1000)
        return Path()

    BlockCache._keep = keep  # type: ignore[method-assign]


def main(folder: str, file: str, hang: str = "") -> None:
    if hang:
        _hang({"half": 0.5, "whole": 1}[hang])
    blocks = [
        {name: TensorRef.from_json(row) for name, row in refs.items()}
        for refs in json.loads(Path(file).read_text())
    ]
    cache = BlockCache(Path(folder), None)
    print("ready", flush=True)
    sys.stdin.readline()
    for refs in blocks:
        print(digest_of(refs, cache), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
