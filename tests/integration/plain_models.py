"""What a run should have made, by plain torch and transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as tf
from models import open_stack, without_blocks

from fusegpt_ray import Recipe
from fusegpt_ray.fusion.group_fusion import GroupFusion
from fusegpt_ray.fusion.student import folded_tensors
from fusegpt_ray.model.runner import Runner
from fusegpt_ray.text.calibration import sample_windows, token_stream
from fusegpt_ray.training.loop import train
from fusegpt_ray.training.states import States
from fusegpt_ray.training.stepper import TorchStepper

CPU = torch.device("cpu")


def dense_model(recipe: Recipe) -> tf.PreTrainedModel:
    return tf.AutoModelForCausalLM.from_pretrained(recipe.model.source, dtype=torch.float32).eval()


def heldout_windows(recipe: Recipe) -> torch.Tensor:
    text = recipe.evaluation["heldout"]
    ids = tf.AutoTokenizer.from_pretrained(recipe.model.source)(
        Path(text.data).read_text(), add_special_tokens=False
    ).input_ids
    return torch.tensor(ids[: len(ids) // text.length * text.length]).view(-1, text.length)


@torch.no_grad()
def plain_perplexity(model: tf.PreTrainedModel, ids_WT: torch.Tensor) -> float:
    losses = [model(input_ids=window[None], labels=window[None]).loss.double() for window in ids_WT]
    return torch.stack(losses).mean().exp().item()


def fused_in_memory(recipe: Recipe, manifest: dict[str, Any], folder: Path) -> tf.PreTrainedModel:
    """The dense model of transformers with the rounds' fine-tuned blocks put in its place, nothing
    published.
    """
    dense = open_stack(Path(recipe.model.source))
    runner = Runner(dense, CPU, torch.float32, recipe.importance.batch)
    tokenizer, settings = tf.AutoTokenizer.from_pretrained(recipe.model.source), recipe.calibration
    stream = token_stream(settings, 1_000_000, tokenizer, "calibration.data")
    windows_WT = torch.from_numpy(
        sample_windows(stream, settings.windows, settings.length, settings.seed, "calibration.data")
    )
    contexts = runner.trunk.contexts(recipe.fusion.batch, settings.length)
    stack, model = dense, dense_model(recipe)
    for number, donor in enumerate(manifest["removed"]):
        job = GroupFusion(
            stack,
            dense,
            donor,
            recipe.fusion,
            recipe.method == "fusegpt",
            recipe.seed,
            str(folder / str(number)),
        )
        states = States(*job.source.walk(runner, windows_WT))
        span = job.build(runner.trunk.meta_blocks, contexts, CPU, torch.float32)
        fused = job.donor_block if job.fuse else None
        config = job.task(windows_WT.numpy(), recipe.cluster, "", "").config
        steps = config.epochs * len(windows_WT) // config.batch
        stepper = TorchStepper.make(span, job.parameter_groups(span), config, steps, CPU)
        train(
            stepper,
            lambda _, s=states, b=config.batch: s.batches(b),
            config.epochs,
            lambda *_: None,
        )
        for block, learned in zip(job.neighbours, span.learned.blocks, strict=True):
            model.model.layers[block.dense].load_state_dict(
                folded_tensors(learned, block, fused, runner.trunk.meta_blocks), strict=False
            )
        stack = stack.drop(donor).swap(job.save(span).blocks)
    return without_blocks(model, "llama", manifest["kept"])
