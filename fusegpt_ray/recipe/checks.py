"""Checks of a recipe that concern how loss batches are cut, what a run may cost, and what stands
beside a text of conversations with images.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from fusegpt_ray.errors import UserError
from fusegpt_ray.recipe.cluster_section import Cluster
from fusegpt_ray.recipe.gpu_prices import may_have_price, unpriced
from fusegpt_ray.recipe.text_sections import Text

GPU_LABEL = "ray.io/accelerator-type"
"""Under which Ray says what kind of GPUs a node has."""


def whole_batches(
    key: str, windows: int, batch: int, batch_key: str = "fusion.batch"
) -> Iterator[UserError]:
    if windows % batch:
        yield UserError(
            key,
            windows,
            f"not a multiple of {batch_key} = {batch}, which are the windows of a step",
            f"use {math.ceil(windows / batch) * batch}",
        )


def shares(cluster: Cluster, batch_key: str, batch: int) -> Iterator[UserError]:
    """A loss batch is shared evenly by the workers, and a worker's share by its micro-batches."""
    workers, micro_batch = cluster.workers, cluster.micro_batch
    if batch % workers:
        problem = f"does not divide {batch_key} = {batch}"
        yield UserError(
            "cluster.workers",
            workers,
            f"{problem}, so workers would hold unequal parts of a loss batch",
            f"use one of {_divisors(batch)}",
        )
    share = batch // workers
    if micro_batch and share % micro_batch:
        problem = f"does not divide the {share} windows of a loss batch that each worker takes"
        yield UserError(
            "cluster.micro_batch", micro_batch, problem, f"use one of {_divisors(share)}"
        )


def budget(cluster: Cluster) -> Iterator[UserError]:
    if cluster.max_cost is None:
        return
    if cluster.gpu_hour_price is None:
        problem = "nobody knows what a GPU costs"
        fix = "give cluster.gpu_hour_price as well, or cluster.max_hours instead"
        yield UserError("cluster.max_cost", cluster.max_cost, problem, fix)
    elif cluster.engine == "ray" and cluster.gpus_per_replica != 0:
        label = cluster.labels.get(GPU_LABEL)
        if label and not may_have_price(cluster.gpu_hour_price, label):
            yield unpriced(cluster.gpu_hour_price, label)


def images(where: str, text: Text, sees: bool) -> Iterator[UserError]:
    """
    Args:
        where: the key of the text's section.
        sees: whether its rows are conversations with images.
    """
    if sees and text.column != Text.model_fields["column"].default:
        problem = "rows are conversations with images, and their columns have fixed names"
        yield UserError(f"{where}.column", text.column, problem, "leave it out")
    if text.image_folder and not sees:
        problem, fix = "rows of text name no images", "set images: true, or leave it out"
        yield UserError(f"{where}.image_folder", text.image_folder, problem, fix)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
