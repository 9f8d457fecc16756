"""The group around a removed block is trained to behave as before."""

from __future__ import annotations

from fusegpt_ray.fusion.group_fusion import GroupFusion
from fusegpt_ray.methods.base import Change, Round
from fusegpt_ray.training.finetune import train_span
from fusegpt_ray.workers.base import News


def train_group(round: Round, fuse: bool) -> Change:
    """Drop the block and train its neighbours; with `fuse`, its weights are fused into them."""
    settings = round.recipe.fusion
    fusion = GroupFusion(
        round.stack,
        round.dense,
        round.donor,
        settings,
        fuse,
        round.recipe.seed,
        round.folder,
        round.fence,
    )
    group = tuple(block.dense for block in fusion.group)
    verb = "fusing" if fuse else "fine-tuning"
    what = f"{verb} blocks {group[0]}–{group[-1]} without {round.donor}"
    round.show.stage(f"round {round.number}: {what}", settings.epochs)

    def news(item: News) -> None:
        if isinstance(item, str):
            round.show.say(item)
        else:
            round.show.epoch(item[0], settings.epochs, item[1])

    task = fusion.task(round.windows_WT, round.recipe.cluster, round.origin, round.checkpoints)
    trained = train_span(round.workers, task, news)
    return Change(
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
