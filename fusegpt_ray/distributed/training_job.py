"""One Ray Train job for the whole run: its workers train span after span, each time with DeepSpeed.

- The job starts once. Its workers take tasks from a mailbox and keep their process, their process
  group and their CUDA context in between.
- Where a worker's memory runs out, the others may wait for it in a collective. So it leaves the
  error in the mailbox and fails; Ray Train starts all of them again, and they take the next task.
- A lost worker ends the attempt within `timeout` seconds, and slow work of a single one does not
  (see `meeting.py`).
- The job belongs to the mailbox's process, not to the driver's: Ray would end a driver without a
  word that leaves while Ray Train still waits for something in it.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fusegpt_ray.distributed.mailbox import Mailbox, Outcome
from fusegpt_ray.distributed.process import JobConfig
from fusegpt_ray.distributed.serve import Job
from fusegpt_ray.distributed.silence import answer
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.store import storage
from fusegpt_ray.termination import came
from fusegpt_ray.workers.base import News

MAX_RESTARTS = 100
"""Of the job, in a whole run. How often one task is attempted is counted by the mailbox."""
END_SECONDS = 30.0
"""How long workers may take to end by themselves, before their processes are killed."""


class TrainingJob:
    """The driver's side."""

    def __init__(self, dense: Stack, config: JobConfig) -> None:
        self.config = config
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        mailbox = Mailbox.options(scheduling_strategy=here)  # type: ignore[attr-defined]
        self._mailbox = mailbox.remote(config.count)
        job = Job(
            self._mailbox,
            ray.put((dense, config)),
            config.count,
            {"CPU": config.cpus} | ({"GPU": config.gpus} if config.gpus else {}),
            config.timeout,
            MAX_RESTARTS,
            config.folder,
            dict(config.labels),
        )
        self._ended = self._mailbox.hold.remote(job)

    def run(
        self,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        news: Callable[[News], None],
    ) -> list[Any]:
        """See `workers.base.Workers.spmd`."""
        task = ray.put((function, arguments))
        self._asked(self._mailbox.post.remote([task]))
        told = False
        while True:
            ended, _ = ray.wait([self._ended], timeout=0)
            outcome: Outcome = self._asked(self._mailbox.outcome.remote(1.0))
            for item in outcome.news:
                news(item)
            if outcome.error:
                raise pickle.loads(outcome.error)
            if outcome.results is not None:
                return outcome.results
            if ended:
                self._raise_end()
            if came() and not told:
                told = True
                self._mailbox.end.remote()

    def close(self, wait: bool) -> None:
        """End the job; with `wait`, workers have time to end by themselves, and what they took of
        the cluster is free again.
        """
        told, _ = ray.wait([self._mailbox.close.remote()], timeout=END_SECONDS)
        ray.wait([self._ended], timeout=END_SECONDS if wait and told else 0)
        ray.kill(self._mailbox)
        storage.remove(self.config.folder, recursive=True)

    def _asked(self, call: ray.ObjectRef) -> Any:
        """The mailbox's answer."""
        advice = "give the command again, which goes on from what is saved"
        return answer(call, "the process that leads the training workers", advice)

    def _raise_end(self) -> None:
        """Raises RuntimeError, with what ended the job as its cause."""
        message = "the training job ended before its task"
        try:
            ray.get(self._ended)
        except RayError as error:
            raise RuntimeError(message) from error
        raise RuntimeError(message)
