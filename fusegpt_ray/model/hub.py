"""Models of the Hugging Face hub: which of their files are fetched into the cache, and what of them
can be known without that.
"""

from __future__ import annotations

import glob
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from fusegpt_ray.errors import first_line, reading_users_file
from fusegpt_ray.model.companions import CONFIG
from fusegpt_ray.store import hub_client
from fusegpt_ray.store.checkpoint import DTYPES, TensorRef

FIX = "give an existing folder, a URI, or a hub id such as meta-llama/Llama-2-7b-hf"
Wanted = Callable[[list[str]], list[str]]


def snapshot(
    name: str, revision: str | None, key: str, wanted: Wanted
) -> tuple[str, tuple[str, ...]]:
    """A hub model's folder in the cache, with those of its files that are `wanted`, and the paths
    of all.

    Without a network it is what the cache holds, and no paths.

    Raises:
        UserError: there is no such model, it may not be read, or it is not in the cache and the hub
        cannot be reached.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    problem = "no such folder here, and the hub does not give it"
    fix = f"{FIX}; check the spelling; for a gated model set HF_TOKEN; offline, give a local folder"
    with quiet(), reading_users_file(key, name, problem, fix):
        try:
            about = HfApi().model_info(name, revision=revision, timeout=hub_client.SOON)
            files = [file.rfilename for file in about.siblings or ()]
        except (
            Exception
        ) as unreachable:  # of whatever kind: the hub, the network, a proxy, or offline by choice
            refused = (
                isinstance(unreachable, HfHubHTTPError) and unreachable.response.status_code < 500
            )
            if refused or isinstance(
                unreachable, ValueError
            ):  # it has answered, or the name is none
                raise
            try:
                return str(
                    snapshot_download(
                        name, revision=revision, allow_patterns=CONFIG, local_files_only=True
                    )
                ), ()
            except LocalEntryNotFoundError:
                offline = isinstance(unreachable, OfflineModeIsEnabled)
                why = (
                    "HF_HUB_OFFLINE is set"
                    if offline
                    else f"it cannot be reached: {first_line(unreachable)}"
                )
                raise ConnectionError(f"{why}; nor is it in the cache here") from unreachable
        patterns = [glob.escape(file) for file in wanted(files)]
        return str(snapshot_download(name, revision=revision, allow_patterns=patterns)), tuple(
            files
        )


def headers(name: str, commit: str, shards: Sequence[str], key: str) -> dict[str, TensorRef]:
    """Every tensor of a hub model's files of weights, of which the headers alone are read.

    Raises:
        UserError: the hub does not give them, or they are not safetensors.
    """
    from huggingface_hub import HfApi

    refs = {}
    problem, fix = "the hub does not give the headers of its weights", "fetch the model first"
    with quiet(), reading_users_file(key, name, problem, fix):
        for shard in shards:
            found = HfApi().parse_safetensors_file_metadata(name, shard, revision=commit)
            for tensor, about in found.tensors.items():
                if about.dtype not in DTYPES:
                    raise ValueError(f"{tensor[:200]} has the unknown dtype {about.dtype[:20]!r}")
                begin, end = about.data_offsets  # from the end of the header on
                refs[tensor] = TensorRef(
                    f"{name}/{shard}", tensor, about.dtype, tuple(about.shape), begin, end
                )
    return refs


@contextmanager
def quiet() -> Iterator[None]:
    """Without the hub client's own progress bars and remarks: our display is the one display. Nor
    does it wait for ever.
    """
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    hub_client.patient()
    log, shown = logging.getLogger("huggingface_hub"), not are_progress_bars_disabled()
    level = log.level
    log.setLevel(logging.ERROR)
    disable_progress_bars()
    try:
        yield
    finally:
        log.setLevel(level)
        if shown:
            enable_progress_bars()
