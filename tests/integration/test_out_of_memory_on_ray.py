"""Ray's tasks and training workers whose memory runs out; the limit is a real one of their
processes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cramped
import pytest
import ray
import torch
from cramped import LENGTH, LIMITS, MB, SCORED, TRAINED, CrampedFusion, save_wide
from models import open_stack, token_windows

from fusegpt_ray.distributed import scoring, training
from fusegpt_ray.distributed.replicas import Replica, Replicas
from fusegpt_ray.distributed.states import datasets, group_states_of_workers
from fusegpt_ray.distributed.training import Workers
from fusegpt_ray.fusion.round import Round
from fusegpt_ray.model.memory import find_batch_size, is_out_of_memory
from fusegpt_ray.sections import PRESETS, Fusion

pytestmark = pytest.mark.integration

REPLICA = Replica(count=1, cpus=1, gpus=0, threads=1, dtype=torch.float32, rows=SCORED)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_wide(tmp_path_factory.mktemp("wide"))


def test_training_workers_that_run_out_of_memory_start_again_with_less(
    ray_session, wide, tmp_path
) -> None:
    count = 2
    windows = token_windows(TRAINED * 2, LENGTH).numpy()
    stack, share = open_stack(wide), TRAINED // count
    values = {"group_size": 3, "rank": 4, "lora_rank": 4, "epochs": 1, "batch": TRAINED}
    free = Round(stack, stack, 2, Fusion(**PRESETS["paper"] | values), True, 0, str(tmp_path))
    replicas = Replicas(stack, REPLICA)
    states = group_states_of_workers(free, windows, count, replicas, 4)
    ray.cloudpickle.register_pickle_by_value(cramped)  # workers do not find the tests' modules
    # Two workers hold half of the loss batch each. What gloo and DeepSpeed take themselves comes on
    # top.
    job = replace(
        free, settings=CrampedFusion(free.settings, LIMITS["finetune"] // count + 20 * MB)
    )

    def learn(micro_batch: int) -> list[float]:
        workers = Workers(
            count, 1, 0, 1, torch.float32, 2, micro_batch
        )  # with DeepSpeed's own bucket of 2 GB nothing would fit
        contexts = scoring.contexts(micro_batch, LENGTH, replicas)
        folder = str(tmp_path / "train")
        return training.finetune(
            job, contexts, len(windows), datasets(states), workers, folder, lambda *_: None
        )[1]

    losses, micro_batch = find_batch_size(learn, share, share, "fine-tuning")
    assert micro_batch < share
    assert losses[0] > 0


def test_errors_of_tasks_and_of_ray_data_are_known(ray_session) -> None:
    def ask(rows: dict[str, object]) -> dict[str, object]:
        torch.empty(10**15)
        return rows

    with pytest.raises(Exception, match="can't allocate memory") as of_task:
        ray.get(ray.remote(ask).remote({}))
    with pytest.raises(Exception, match="can't allocate memory") as of_data:
        ray.data.range(2).map_batches(ask).materialize()
    assert is_out_of_memory(of_task.value)
    assert is_out_of_memory(of_data.value)
