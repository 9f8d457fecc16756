"""Each tracker by its own library, which is imported when a run begins, in a process of its own
(see `apart.py`). Where curves go, and how one logs in, is said to the library in its own way: by
its environment variables. No torch.
"""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from fusegpt_ray.errors import UserError
from fusegpt_ray.run.outputs import CURVES
from fusegpt_ray.store import storage

PROJECT = "fusegpt"
"""What runs belong to where the environment names no other."""


@dataclass(frozen=True)
class About:
    """What a tracker is told of a run."""

    name: str
    id: str
    """The same for a run that goes on, and for no other."""
    run: str
    """What manifests call it; the same recipe at another place has the same."""
    config: Mapping[str, Any]
    """The recipe."""
    place: str
    """The output's URI."""


class Tracker(Protocol):
    """One that has begun, or gone on with, a run."""

    where: str
    """Where its curves can be seen, for a person."""

    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def close(self, well: bool) -> None:
        """`well`: the run has come to its end."""


class TensorBoard:
    """A file of its own for each process, which is copied to the output whenever it has grown."""

    def __init__(self, about: About) -> None:
        from tensorboardX.event_file_writer import EventsWriter

        self.where = storage.join(about.place, f"{about.name}{CURVES}")
        self._folder = tempfile.TemporaryDirectory()
        prefix = os.path.join(self._folder.name, "events")
        # Not `SummaryWriter`, whose flush leaves out what its own thread has still to write.
        self._writer = EventsWriter(prefix, f".{os.getpid()}")
        self._copied = True

    def log(self, values: Mapping[str, float], step: int) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        for tag, value in values.items():
            event = Event(wall_time=time.time(), step=step, summary=scalar(tag, value))
            self._writer.write_event(event)
        self._copied = False
        self._copy()

    def close(self, well: bool) -> None:
        if not self._copied:  # the last time it failed
            self._copy()
        self._writer.close()
        self._folder.cleanup()

    def _copy(self) -> None:
        self._writer.flush()
        for file in Path(self._folder.name).iterdir():
            storage.write(storage.join(self.where, file.name), file.read_bytes(), retry_for=0)
        self._copied = True


class Wandb:
    """`WANDB_PROJECT`, `WANDB_MODE`, `WANDB_API_KEY` and the like are honoured."""

    def __init__(self, about: About) -> None:
        import wandb

        online = wandb.setup().settings.mode == "online"
        if online and not wandb.login(prompt=False, verify=False):  # it would ask on the terminal
            raise RuntimeError("not logged in: run `wandb login`, or set WANDB_MODE=offline")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=about.name,
            id=about.id,
            resume="allow",
            config={**about.config, "run": about.run},
            settings=wandb.Settings(console="off", silent=True),
        )
        self._run.define_metric("*", step_metric="step")
        self.where = self._run.dir if self._run.offline else self._run.url

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "step": step})  # its own steps may not go back

    def close(self, well: bool) -> None:
        self._run.finish(exit_code=0 if well else 1)


class Mlflow:
    """`MLFLOW_TRACKING_URI` and `MLFLOW_EXPERIMENT_NAME` are honoured."""

    def __init__(self, about: About) -> None:
        from mlflow import MlflowClient

        self._client = client = MlflowClient()
        name, tag = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT), "fusegpt.id"
        experiment = client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else client.create_experiment(name)
        found = client.search_runs([number], f"tags.`{tag}` = '{about.id}'", max_results=1)
        lack = ""
        if found:
            self._id = found[0].info.run_id
            client.update_run(self._id, status="RUNNING")
        else:
            tags = {tag: about.id, "fusegpt.run": about.run}
            self._id = client.create_run(number, run_name=about.name, tags=tags).info.run_id
            try:
                self._log_params(about.config)
            except Exception as error:  # curves need none
                lack = f", without the recipe ({type(error).__name__}: {error})"
        self.where = f"{client.tracking_uri}, experiment {name}, run {self._id}{lack}"

    def _log_params(self, config: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        params = [Param(_mlflow_key(key), str(value)[:6000]) for key, value in _flat(config)]
        for first in range(0, len(params), 100):  # it takes no longer ones, and no more
            self._client.log_batch(self._id, params=params[first : first + 100])

    def log(self, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = time.time_ns() // 1_000_000
        metrics = [Metric(_mlflow_key(tag), value, now, step) for tag, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self, well: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if well else "FAILED")


def _mlflow_key(name: str) -> str:
    """What MLflow takes for a name: these characters, as a path that has no shorter form."""
    parts = re.sub(r"[^\w ./-]", "_", name).split("/")
    path = "/".join("_" if part in ("", ".", "..") else part for part in parts)
    return path if len(path) <= 250 else path[:250].rstrip("/.")


class Trackio:
    """`TRACKIO_DIR`, `TRACKIO_SPACE_ID` and the like are honoured."""

    def __init__(self, about: About) -> None:
        import trackio

        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=f"{about.name}-{about.id}",
            config={**about.config, "run": about.run},
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        self.where = f"trackio show --project {self._run.project}"

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self, well: bool) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[About], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": Mlflow,
    "trackio": Trackio,
}
"""By what the recipe calls them; see `sections.Tracker`."""
_PACKAGES = {"tensorboard": "tensorboardX"}
"""What is imported, where it is called otherwise."""


def check_trackers(names: Iterable[str]) -> None:
    """
    Raises:
        UserError: a library is not installed.
    """
    for name in names:
        package = _PACKAGES.get(name, name)
        found = find_spec(package)
        # wandb writes into a folder `wandb`, which may then be found for the package.
        if found is None or found.origin is None:
            problem = f"it needs the package {package}, which is not installed"
            fix = f"pip install 'fusegpt-ray[{name}]', or leave it out"
            raise UserError("output.track", name, problem, fix)


def _flat(config: Any, path: str = "") -> Iterable[tuple[str, Any]]:
    """The keys of a recipe with dots: fusion.epochs."""
    if not isinstance(config, Mapping):
        return [(path, config)]
    items = (_flat(value, f"{path}.{key}".lstrip(".")) for key, value in config.items())
    return [pair for pairs in items for pair in pairs]
