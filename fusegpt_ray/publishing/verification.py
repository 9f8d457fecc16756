"""Is a published model what its manifest says? Every byte is read; tensors are not loaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fusegpt_ray.errors import UserError, reason
from fusegpt_ray.model.architecture import dense_stack
from fusegpt_ray.model.companions import WEIGHTS
from fusegpt_ray.model.source import Source
from fusegpt_ray.store import storage
from fusegpt_ray.store.checkpoint import INDEX, SINGLE, read_header, read_index
from fusegpt_ray.store.manifest import KEY, MANIFEST, Manifest
from fusegpt_ray.store.records import damage
from fusegpt_ray.store.threads import at_once
from fusegpt_ray.terminal.display import Transfer


def verify(uri: str, display: Transfer | None = None) -> dict[str, Any]:
    """{"model", "good", "files", "bytes", "problems": [{"file", "problem"}], "remarks": [{"file",
    "remark"}]}.

    Raises:
        UserError: there is no manifest at `uri`, or not one that can be trusted.
    """
    folder = storage.absolute(uri).rstrip("/")
    manifest = Manifest.read(folder)
    with display or Transfer() as show:
        show.begins(f"verifying {folder}", len(manifest.files), manifest.size)

        def check(name: str) -> str:
            try:
                problem = damage(storage.join(folder, name), manifest.files[name])
            except (
                Exception
            ) as error:  # whatever a store raises; the other files are checked all the same
                problem = f"cannot be read ({reason(error)})"
            show.at(name, manifest.files[name].size)
            show.ends(name, problem or "is whole")
            return problem

        found = zip(manifest.files, at_once(check, manifest.files), strict=True)
        problems = {name: problem for name, problem in found if problem}
        extra = sorted(set(storage.below(folder)) - set(manifest.files) - {MANIFEST})
        remarks = [name for name in extra if not name.lower().endswith((*WEIGHTS, ".index.json"))]
        problems |= {
            name: "is not in the manifest, but a loader may take it for weights"
            for name in extra
            if name not in remarks
        }
        if not problems:  # of files that are not what was written nothing more is worth saying
            problems = dict(_disagreements(folder, manifest))
    return {
        "model": uri,
        "good": not problems,
        "files": len(manifest.files),
        "bytes": manifest.size,
        "problems": [{"file": name, "problem": problem} for name, problem in problems.items()],
        "remarks": [{"file": name, "remark": "is not in the manifest"} for name in remarks],
    }


def _disagreements(folder: str, manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Between headers, index, configuration and manifest: the file and what is wrong, the first
    level that has any.
    """
    shards = [name for name in manifest.files if name.endswith(".safetensors")]
    held: list[tuple[str, str]] = []
    damaged = False
    for shard in shards:
        try:
            held += [(tensor, shard) for tensor in read_header(storage.join(folder, shard), KEY)]
        except UserError as error:
            damaged = True
            yield shard, error.problem
    if damaged:
        return
    index = INDEX if INDEX in manifest.files else SINGLE
    try:
        tensors = read_index(folder, KEY)
    except UserError as error:
        yield index, error.problem
        return
    if index == INDEX:
        said = list(storage.read_json(storage.join(folder, INDEX))["weight_map"].items())
    else:
        said = [(tensor, SINGLE) for tensor in tensors]
    for tensor, shard in sorted({*held} ^ {*said})[:1]:
        where = "has" if (tensor, shard) in held else "does not have"
        yield shard, f"{where} the tensor {tensor}, unlike {index} says"
        return
    try:
        blocks = len(dense_stack(Source(folder, None, folder).config(KEY), tensors))
    except UserError as error:
        yield "config.json", f"{error.value}: {error.problem}"
        return
    if blocks != len(manifest.data["kept"]):
        yield "config.json", f"says {blocks} blocks, {MANIFEST} keeps {len(manifest.data['kept'])}"
