"""The group around a removed block is trained to behave as before."""

from __future__ import annotations

from dataclasses import replace

from fusegpt_ray.fusion.group_fusion import GroupFusion
from fusegpt_ray.fusion.repair import Repaired
from fusegpt_ray.methods.base import Change, Round
from fusegpt_ray.methods.repairing import repaired
from fusegpt_ray.samples import tokens_of
from fusegpt_ray.store.records import checksum
from fusegpt_ray.training.finetune import train_span
from fusegpt_ray.workers.base import News


def train_group(round: Round, fuse: bool) -> Change:
    """Drop the block and train its neighbours; with `fuse`, its weights are fused into them."""
    settings, origin = round.recipe.fusion, round.origin
    start = repaired(round) if round.recipe.repairs else None
    if start and start.block:
        # What is trained is another group wherever the start could be another.
        origin = checksum({"after": origin, "start": [f.sha256 for f in start.files.values()]})[:16]
    fusion = GroupFusion(
        round.stack,
        round.dense,
        round.donor,
        settings,
        fuse,
        round.recipe.seed,
        round.folder,
        round.fence,
        start.block if start else None,
    )
    group = tuple(block.dense for block in fusion.group)
    verb = "fusing" if fuse else "fine-tuning"
    what = f"{verb} blocks {group[0]}–{group[-1]} without {round.donor}"
    round.show.stage(f"round {round.number}: {what}", settings.epochs)
    round.show.training(tokens_of(round.windows).size, round=round.number)
    for line in fusion.other_kinds():
        round.show.say(f"  {line}")

    def news(item: News) -> None:
        if isinstance(item, str):
            round.show.say(item)
        else:
            round.show.epoch(item[0], settings.epochs, item[1])

    task = fusion.task(round.windows, round.recipe.cluster, origin, round.checkpoints)
    trained = train_span(round.workers, task, news, round.pause)
    change = Change(
        round.stack.drop(round.donor).swap(trained.saved.blocks),
        trained.saved.files,
        group,
        tuple(trained.losses),
        trained.states_batch_size,
        trained.micro_batch,
        trained.states_bytes_read,
        trained.states_seconds,
        trained.train_seconds,
    )
    return change if start is None else _with_start(change, start)


def _with_start(change: Change, start: Repaired) -> Change:
    """A kept term lies on the start's weights, so its files belong to the round."""
    sizes = [size for size in (change.states_batch_size, start.batch_size) if size]
    return replace(
        change,
        files={**start.files, **change.files},
        repair=start.to_record(),
        states_batch_size=min(sizes, default=None),
        states_bytes_read=change.states_bytes_read + start.bytes_read,
        states_seconds=change.states_seconds + start.seconds,
    )
