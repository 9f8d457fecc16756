"""Training on samples with images, beside plain autograd through the real model; and what of the
model stays as it was, to the byte.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from models import DEPTH, open_stack, without_blocks
from pictures import BLOCKS, SEEING, load_seeing, passes, samples, save_seeing
from published_models import FACTS
from runners import local_workers
from safetensors.torch import load_file
from torch.nn.functional import pad

from fusegpt_ray.fusion.group_fusion import GroupFusion
from fusegpt_ray.healing.whole_model import WholeModel
from fusegpt_ray.measuring import evaluation
from fusegpt_ray.model.recorder import run_block
from fusegpt_ray.model.runner import Runner
from fusegpt_ray.model.source import Source
from fusegpt_ray.publishing.publish import publish
from fusegpt_ray.recipe.cluster_section import Cluster
from fusegpt_ray.recipe.sections import Fusion, Heal, Importance
from fusegpt_ray.recipe.specs import PRESETS
from fusegpt_ray.samples import Samples
from fusegpt_ray.training.batch import LossBatch, token_weights
from fusegpt_ray.training.finetune import Trained, train_span
from fusegpt_ray.training.losses import normalized_mse
from fusegpt_ray.training.microbatch import accumulate

CPU = torch.device("cpu")
DROPPED = 2
KEPT = [block for block in range(DEPTH) if block != DROPPED]
LOCAL = Cluster(engine="local")


def gradients_by_hand(folder: Path, given: Samples) -> dict[str, torch.Tensor]:
    """Of KL(model ‖ model without a block), the mean over all real tokens, by each parameter of the
    blocks that are left.
    """
    model = load_seeing(folder)
    short = without_blocks(model, "llava", KEPT)
    with torch.no_grad():
        wanted = [logits.log_softmax(-1) for _, logits in passes(model, given)]
    total = torch.zeros(())
    for row, log_p in enumerate(wanted):
        ids = torch.tensor(given.tokens_WT[row, : len(log_p)])[None]
        tensors = {key: torch.tensor(value) for key, value in given.inputs[row].load().items()}
        log_q = short(input_ids=ids, use_cache=False, **tensors).logits[0].log_softmax(-1)
        total = total + (log_p.exp() * (log_p - log_q)).sum()
    (total / sum(map(len, wanted))).backward()
    blocks = short.get_submodule(BLOCKS)
    return {name: value.grad for name, value in blocks.named_parameters()}


@pytest.mark.parametrize("micro", [None, 1])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", SEEING)
def test_healing_has_the_gradients_of_the_real_model(
    name: str, recompute: bool, micro: int | None, tmp_path: Path
) -> None:
    folder, given = save_seeing(name, tmp_path / name), samples(name)
    dense = open_stack(folder)
    runner = Runner(dense, CPU, torch.float32, batch_size=3)
    model = WholeModel(dense.drop(DROPPED), dense, Heal(train="all"), 0, str(tmp_path))
    contexts = runner.trunk.contexts(1, given.shape[1])
    span = model.build(runner.trunk.meta_blocks, contexts, CPU, torch.float32, recompute, run_block)
    source = model.task(given, given, LOCAL, {}, "").source
    owns = runner.enter(given)[1]
    batch = LossBatch(*source.walk(runner, given), token_weights(given), owns)
    span.form(span.learned)
    accumulate(span, batch, model.loss(runner.trunk), micro, False)
    span.root().backward()
    found = {
        f"{number}.{path}": value.grad
        for number, block in enumerate(span.learned.blocks)
        for path, value in block.named_parameters()
    }
    expected = gradients_by_hand(folder, given)
    assert len(found) == len(expected) > 0
    for key, value in found.items():
        wanted = expected[key.replace(".value.", ".").removesuffix(".value")]
        torch.testing.assert_close(value, wanted, rtol=1e-3, atol=1e-6)


def tuned(folder: Path, given: Samples, out: Path, **values: Any) -> tuple[Trained, GroupFusion]:
    settings = PRESETS["rounds"]["fusion"] | {
        "group_size": 3,
        "rank": 4,
        "lora_rank": 4,
        "batch": 2,
        "epochs": 4,
    }
    dense = open_stack(folder)
    fusion = Fusion(**settings | values)
    job = GroupFusion(dense, dense, DROPPED, fusion, True, 0, str(out / "blocks"))
    with local_workers(folder, Importance(batch=2)) as workers:
        task = job.task(given, LOCAL, "x", str(out / "checkpoints"))
        return train_span(workers, task, lambda _: None), job


def digests(folder: Path, part: str) -> dict[str, str]:
    tensors = load_file(folder / "model.safetensors")
    return {
        name: hashlib.sha256(value.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, value in tensors.items()
        if part in name
    }


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_a_fused_model_sees_as_before(name: str, tmp_path: Path) -> None:
    """Trained on images, published, proven on them and measured; the tower and what joins it to
    the language model keep every byte.
    """
    folder, given = save_seeing(name, tmp_path / name), samples(name)
    trained, job = tuned(folder, given, tmp_path, learning_rate=1e-2)
    assert trained.losses[-1] < 0.9 * trained.losses[0]
    stack = job.stack.drop(DROPPED).swap(trained.saved.blocks)
    out, source = tmp_path / "out", Source.find(str(folder), None)
    with local_workers(folder, Importance(batch=2)) as workers:

        def measured(published: Any) -> dict[str, Any]:
            proof = evaluation.prove(workers, published, str(out), stack, given)
            assert proof.states == proof.kl == 0
            return {}

        publish(str(out), stack, job.dense, source, 10**9, FACTS, measured)
    short = load_seeing(out)
    assert short.config.get_text_config().num_hidden_layers == DEPTH - 1
    runner = Runner(open_stack(out), CPU, torch.float32, batch_size=3)
    for h_WTD in runner.walk(runner.stack, given):  # noqa: B007 - the last states are wanted
        pass
    for row, (states, _) in enumerate(passes(short, given)):
        assert torch.equal(h_WTD[row, : len(states)], states)
    for part in ("vision", "visual", "projector", "embed", "lm_head"):
        assert digests(out, part) == digests(folder, part)
    assert digests(folder, "visual") or digests(folder, "vision")


def test_epochs_are_the_same_to_the_bit_again(tmp_path: Path) -> None:
    folder, given = save_seeing("llava", tmp_path / "llava"), samples("llava")
    first, second = (tuned(folder, given, tmp_path / part)[0] for part in "ab")
    assert first.losses == second.losses
    records = [[file.sha256 for file in item.saved.files.values()] for item in (first, second)]
    assert records[0] == records[1]


def test_a_group_is_trained_to_the_states_of_real_tokens(tmp_path: Path) -> None:
    """The first epoch's loss, at a rate of nearly 0, is that of the group without the donor."""
    folder, given = save_seeing("qwen2_vl", tmp_path / "it"), samples("qwen2_vl")
    tiny = {"learning_rate": 1e-12, "lora_learning_rate": 1e-12, "epochs": 1}
    trained, job = tuned(folder, given, tmp_path, **tiny)
    model = load_seeing(folder)
    group = [block.dense for block in job.group]
    upto = [*range(group[-1] + 1)]
    full = passes(without_blocks(model, "llava", upto), given)
    short = passes(without_blocks(model, "llava", [b for b in upto if b != DROPPED]), given)
    weights = token_weights(given)
    length = given.shape[1]
    wanted, found = (
        torch.stack([pad(states, (0, 0, 0, length - len(states))) for states, _ in side])
        for side in (full, short)
    )
    expected = normalized_mse(found, wanted, False, weights).item()
    assert trained.losses[0] == pytest.approx(expected, rel=1e-3)
