"""Secrets in the environment, as users have them, and who finds them again."""

from __future__ import annotations

from pathlib import Path

import pytest

PLANTED = {
    "AWS_SESSION_TOKEN": "PLANTED-SESSION-TOKEN-51e0",
    "HF_TOKEN": "PLANTED-HUB-TOKEN-c2a7",
    "WANDB_API_KEY": "PLANTED-OTHER-KEY-88f3",
    "FUSEGPT_TEST_PASSWORD": "PLANTED-PASSWORD-06bd",
}
MARK = "PLANTED-"
"""What all of them begin with, and S3's keys, too (see conftest.py)."""


def plant(patch: pytest.MonkeyPatch, keys: tuple[str, str]) -> None:
    """`keys`: S3's, which are in the environment already."""
    for name, value in PLANTED.items():
        patch.setenv(name, value)
    assert all(key.startswith(MARK) for key in keys)


def leaks(folder: Path) -> list[str]:
    """Files below a folder that hold a planted secret."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return [str(path) for path in files if MARK.encode() in path.read_bytes()]


def in_objects(objects: dict[str, bytes]) -> list[str]:
    return [key for key, data in objects.items() if MARK.encode() in data]
