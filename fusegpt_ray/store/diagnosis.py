"""What an unexpected file or folder really is, in words, and what to do. Light: no torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from fusegpt_ray.errors import UserError

SAVE = "load it with transformers, then save_pretrained(folder) writes safetensors"
_BEGINNINGS = {
    b"version https://git-lfs": "a Git LFS pointer instead of the file",
    b"<!doctype html": "a web page instead of the file",
    b"<html": "a web page instead of the file",
    b"GGUF": "a GGUF file",
    b"PK\x03\x04": "a zip file or a zipped pickle",
    b"\x80\x02": "a pickle",
    b"\x80\x03": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
    b"\xef\xbb\xbf": "a text that begins with a byte-order mark, which transformers does not read",
    b"\xff\xfe": "a text in UTF-16, which transformers does not read",
    b"\xfe\xff": "a text in UTF-16, which transformers does not read",
}
BEGINNING = max(map(len, _BEGINNINGS))
"""Bytes from the start of a file that `kind` needs."""
_FIXES = {
    "Git LFS": "fetch the files: `git lfs pull` in the repository, or "
    "`hf download ORG/NAME --local-dir FOLDER`",
    "web page": "download it again, with the credentials that it needs",
    "byte-order": "save it as UTF-8 without a byte-order mark",
    "UTF-16": "save it as UTF-8",
    "GGUF": "use the original checkpoint in safetensors; convert to GGUF what this tool publishes",
}
_USUAL = "give the folder of a Hugging Face checkpoint"
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".npz", ".onnx")
_NO_PICKLES = (".h5", ".msgpack", ".npz", ".onnx")


def kind(beginning: bytes) -> str:
    """What a file with this beginning is ("a Git LFS pointer instead of the file"), or nothing."""
    lower = beginning.lstrip().lower()
    for mark, what in _BEGINNINGS.items():
        if beginning.startswith(mark) or (mark.startswith(b"<") and lower.startswith(mark)):
            return what
    return ""


def is_placeholder(beginning: bytes) -> bool:
    """Whether something else stands for the file: nobody can use it."""
    return kind(beginning).endswith("instead of the file")


def remedy(what: str) -> str:
    """What to do about a file of this `kind`."""
    found = (fix for sign, fix in _FIXES.items() if sign in what)
    return next(found, "download or convert the checkpoint again (safetensors only)")


def refuse_other_kinds(key: str, value: object, name: str, beginning: bytes) -> None:
    """For a text file called `name` that begins like this.

    Raises:
        UserError: it is something else.
    """
    if what := kind(beginning):
        raise UserError(key, value, f"{name} is {what}", remedy(what))


def unusable_file(name: str, beginning: bytes) -> tuple[str, str]:
    """What a file is that was given in place of a checkpoint's folder, and what to do."""
    if name.endswith(".safetensors"):
        return "a file, not a folder", "give its folder, which holds config.json, too"
    what = kind(beginning)
    if "pickle" in what or name.endswith(_OTHER_WEIGHTS):
        never = "" if name.endswith(_NO_PICKLES) else "; pickles are never opened"
        return f"a file of weights, not a safetensors checkpoint{never}", SAVE
    if what:
        return f"{what}, not a folder", remedy(what)
    return "a file, not a folder", "give the folder that holds config.json"


def unusable_folder(files: Collection[str], folders: Collection[str]) -> tuple[str, str]:
    """Why a folder without a whole checkpoint is none, and what to do.

    `files`, `folders`: the names directly in it.
    """
    if {"model.safetensors", "model.safetensors.index.json"} & {*files}:
        return "", _USUAL
    found = _other_weights(files, folders) or _folder_of_checkpoints(files, folders)
    return found or ("", _USUAL)


def _other_weights(files: Collection[str], folders: Collection[str]) -> tuple[str, str] | None:
    """Why the weights in a folder cannot be used, and what to do; None if there are none."""
    adapters = _matching(files, r"adapter_(config|model)\.")
    whole = [name for name in files if name not in adapters]
    if shards := _matching(whole, r"model-\d+-of-\d+\.safetensors\Z"):
        problem = (
            f"{len(shards)} shards are there ({_some(shards)}), but no "
            "model.safetensors.index.json that says what is in which"
        )
        return problem, "download the index, too; it belongs to the checkpoint"
    if safe := _matching(whole, r".*\.safetensors\Z"):
        problem = (
            f"its weights are called {_some(safe)}, and transformers looks for model.safetensors"
        )
        fix = (
            "give the folder of a checkpoint in the format of Hugging Face, "
            "as save_pretrained writes it"
        )
        return problem, fix
    if adapters:
        fix = (
            "merge it into its base model first: PeftModel.from_pretrained(base, adapter)"
            ".merge_and_unload().save_pretrained(folder)"
        )
        return f"an adapter ({_some(adapters)}), not a whole model", fix
    if gguf := _matching(files, r".*\.gguf\Z"):
        return f"a GGUF checkpoint ({_some(gguf)})", remedy("GGUF")
    if zero := _matching((*files, *folders), r"global_step\d+$|(zero_pp_|mp_)rank_"):
        fix = "make a whole one of it: zero_to_fp32.py in the training folder, then save_pretrained"
        return f"a training checkpoint of DeepSpeed ({_some(zero)})", fix
    if pickles := sorted(name for name in whole if name.endswith(_OTHER_WEIGHTS)):
        never = "" if pickles[0].endswith(_NO_PICKLES) else "; pickles are never opened"
        return f"not a safetensors checkpoint (found {_some(pickles)}){never}", SAVE
    return None


def _folder_of_checkpoints(
    files: Collection[str], folders: Collection[str]
) -> tuple[str, str] | None:
    """Where the checkpoints of a folder lie, if they do in one of its folders."""
    if steps := sorted(_matching(folders, r"checkpoint-\d+\Z"), key=lambda name: int(name[11:])):
        problem = f"a training folder, whose checkpoints lie in {_some(steps)}"
        return problem, f"give one of them, such as …/{steps[-1]}"
    if "snapshots" in folders:
        problem = "a folder of the hub's cache, whose checkpoints lie in snapshots"
        return problem, "give the hub id, or …/snapshots/COMMIT"
    if "model_index.json" in files:
        problem = "a diffusers pipeline of several models (model_index.json)"
        return problem, "give the folder of a causal language model, if it has one"
    return None


def _matching(names: Iterable[str], pattern: str) -> list[str]:
    """Those that begin with a match, in order."""
    return sorted(name for name in names if re.match(pattern, name, re.DOTALL))


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
