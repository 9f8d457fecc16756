"""What all tests share: one thread, no network, and tiny checkpoints written once a session."""

from __future__ import annotations

import os

# Before anything imports these libraries: they read their environment once.
os.environ.update(
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    RAY_AUTH_MODE="disabled",
    RAY_worker_niceness="0",  # beside another process that tests, others get little of two cores
)

import gc
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from material import Material

torch.set_num_threads(1)
if not torch.cuda.is_available():  # else DeepSpeed finds the GPU, as for a user
    os.environ["DS_ACCELERATOR"] = "cpu"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    from slow import mark_slow

    # `-k` and `-m` are applied later; only a name given with `::` leaves out tests of a file here.
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="there is no GPU"))
    mark_slow(items, whole_files=not any("::" in argument for argument in config.args))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Processes that test at the same time take whole files, and one of them takes all that share
    a Ray, so that it starts once."""
    from xdist.scheduler import LoadFileScheduling

    class OneHasRay(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            return "ray" if "ray_session" in (config.rootpath / file).read_text() else file

    return OneHasRay(config, log) if config.getoption("dist") == "loadfile" else None


def pytest_collection_finish() -> None:
    """What has been imported stays to the end: no garbage collection is to look at it, which took
    a tenth of the time where it was measured."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A cache of its own for this process and all that it starts, never that of the user."""
    os.environ["FUSEGPT_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name of a tiny model (see `models.MODELS`) → the folder of its checkpoint."""
    from models import save_tiny

    folders: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in folders:
            folders[name] = save_tiny(name, tmp_path_factory.mktemp(name))
        return folders[name]

    return get


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    """A tiny model with texts and a recipe, for whole runs."""
    from material import make_material

    return make_material(tmp_path_factory.mktemp("material"))
