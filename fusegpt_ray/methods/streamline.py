"""`streamline`: a run of consecutive blocks is replaced by one light block, trained to give what
the run gave (LLM-Streamline, Chen et al., arXiv 2403.19135).

With h_l,t the state of token t that enters block l, and n blocks to remove, the run is the n + 1
blocks l … l + n of

    argmax over l of  E over t of  cos(h_l,t, h_l+n+1,t),

and its first block f, a plain block of the model, is trained to

    min over f of  E over t and D of  (f(h_l,t) − h_l+n+1,t)²,

the states being those of the dense model. So n blocks fewer, one of them a round, and f is trained
in the last. It costs one walk of the dense model over the windows that score, one over all windows
up to the end of the run, and `fusion.epochs` passes there and back through one block. A block's
score is the least distance 1 − cos of a run in which it stands behind another. The n lowest scores,
of which equal ones go by number, are then those of the best run, of equally good ones the first.
Another n is another run.

The abstract leaves open, and ours is: that the mean over the tokens of the windows that score
chooses the run, that all of f learns, in float32 and by Adam on a cosine, on the calibration's
windows, and that training to the logits, if any, is that of all blocks afterwards (`heal`).

The light network is the paper's Transformer layer, initialised from the run's first block. The
paper also has an MLP as one. With `fusion.light: mlp` it is the MLP of a plain block,

    f(h) = h + MLP(norm(h)),

whose attention is there and gives nothing, because its output layer is zero and stays so: what else
the class would load. It begins as that of the run's first block. As a file it is no lighter, and
fewer weights learn. Which layer that is is found by trying (`fusion/writers.py`).
"""

from __future__ import annotations

from dataclasses import replace

from fusegpt_ray.errors import UserError
from fusegpt_ray.fusion.writers import mixers, zeros
from fusegpt_ray.healing.light_block import LightBlock
from fusegpt_ray.importance.ranking import Ranking
from fusegpt_ray.importance.removals import run_distances
from fusegpt_ray.methods.base import Change, Method, Question, Round
from fusegpt_ray.methods.choosing import once
from fusegpt_ray.model.architecture import build_meta_blocks
from fusegpt_ray.model.structure import observe
from fusegpt_ray.samples import lengths, tokens_of
from fusegpt_ray.store import storage
from fusegpt_ray.store.records import FileRecord
from fusegpt_ray.store.writer import entries_of, write_safetensors
from fusegpt_ray.training.finetune import train_span
from fusegpt_ray.workers.base import News

FARTHEST = 2.0
"""1 − cos of opposite states: the score of the first block of all, which stands behind none."""


def _best_run(asked: Question) -> Ranking:
    count, kept = asked.left, asked.stack.kept
    sums = run_distances(asked.workers, asked.stack, asked.windows, asked.settings, count + 1)
    tokens = sum(lengths(asked.windows, asked.settings.tokens, 0))
    if not tokens:
        problem = "the calibration has no such tokens"
        raise UserError("importance.tokens", asked.settings.tokens, problem, "use all")
    runs = (sums / tokens).tolist()
    # The runs in which a block stands behind another begin 1 to `count` places before it.
    scores = {n: min(runs[max(0, p - count) : p], default=FARTHEST) for p, n in enumerate(kept)}
    return Ranking.without_work(scores)


def _light_block(round: Round, first: int, last: int) -> tuple[LightBlock, dict[str, FileRecord]]:
    """It, and what was written for it: the zeros that are its attention's output, of an MLP."""
    settings, dense, files = round.recipe.fusion, round.dense, dict[str, FileRecord]()
    light = LightBlock(dense, first, last, settings, round.recipe.seed, round.folder, round.fence)
    if settings.light == "block":
        return light, files
    names, refs = mixers(observe(dense.config), first), dense.blocks[first].weights
    tensors = zeros(build_meta_blocks(dense.config)[first], names, refs)
    uri = storage.join(round.folder, "zeros.safetensors")
    round.fence()
    files[uri], written = write_safetensors(uri, entries_of(tensors))
    return replace(light, zeros=written, frozen=frozenset(names)), files


def _replace(round: Round) -> Change:
    """The block goes. Once no other has to, the one before it learns to do what the run did."""
    if round.left > 1:
        return Change(round.stack.drop(round.donor))
    settings, show, stack = round.recipe.fusion, round.show, round.stack
    first = stack.blocks[stack.position(round.donor) - 1].dense
    last = first + len(round.dense) - len(stack) + 1
    show.stage(
        f"round {round.number}: training one block in place of {first}–{last}", settings.epochs
    )
    show.training(tokens_of(round.windows).size, round=round.number)

    def news(item: News) -> None:
        if isinstance(item, str):
            show.say(item)
        else:
            show.epoch(item[0], settings.epochs, item[1])

    light, files = _light_block(round, first, last)
    task = light.task(round.windows, round.recipe.cluster, round.origin, round.checkpoints)
    trained = train_span(round.workers, task, news, round.pause)
    return Change(
        stack.replace((first, round.donor), trained.saved.blocks[first]),
        {**files, **trained.saved.files},
        (first,),
        tuple(trained.losses),
        trained.states_batch_size,
        trained.micro_batch,
        trained.states_bytes_read,
        trained.states_seconds,
        trained.train_seconds,
        replaced=tuple(round.dense.kept[first : last + 1]),
    )


METHOD = Method("streamline", once(_best_run), _replace)
