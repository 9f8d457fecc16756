"""The commands that need workers: compress, score and evaluate.

`compress` reads: plan → open the workers → rounds, healing, publishing (`compressing/`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from fusegpt_ray.compressing.compression import Compression
from fusegpt_ray.importance.scoring import score as score_stack
from fusegpt_ray.measuring.as_loaded import compare_source
from fusegpt_ray.measuring.perplexities import check_several, measure, naming, open_for, rows
from fusegpt_ray.model.finite import explained
from fusegpt_ray.planning.plan import leading_tokens, plan
from fusegpt_ray.preparing.opening import find_model, open_model
from fusegpt_ray.preparing.preflight import check_images, check_tokens
from fusegpt_ray.preparing.windows import calibration_windows
from fusegpt_ray.publishing.publish import Published
from fusegpt_ray.recipe.cluster_section import Cluster
from fusegpt_ray.recipe.recipe import Recipe
from fusegpt_ray.recipe.sections import Evaluation, Model
from fusegpt_ray.run.budget import Budget
from fusegpt_ray.run.journal import Journal
from fusegpt_ray.run.shared import Shared
from fusegpt_ray.terminal.display import Display
from fusegpt_ray.workers.base import Setup, Workers
from fusegpt_ray.workers.room import Need, ResourcePool, Room


def compress(
    recipe: Recipe, display: Display | None = None, restart: bool = False
) -> list[Published]:
    """Make the model shallower or deeper, as the recipe says; returns what was published, the
    lightest compression first.

    Run again after a failure, it goes on from the last committed round; with `restart` it forgets
    an unfinished run and begins anew. Run again after its end, it finds what it published.

    Raises:
        UserError: the recipe cannot be carried out; nothing was written then.
        BudgetSpent: `cluster.max_hours` or `cluster.max_cost` is spent; the run can go on.
    """
    with display or Display() as whole:
        show = whole.of_run(recipe.output.name)
        planned = plan(recipe, show, restart)
        last = planned.targets[-1]
        change = f"{last.add} to add" if last.add else f"{last.remove} to remove"
        if last.width:
            change = last.width.in_words()
        blocks = f"{len(planned.model.stack)} blocks, {change}"
        show.say(f"{planned.model.source.name}: {blocks} ({recipe.method})")
        show.say(planned.cost.in_words())
        if limits := planned.removable.in_words():
            show.say(limits)
        if not restart:  # before anything is started that costs more
            Budget(recipe.cluster, Journal.of(recipe).folder, began=None).check()
        with open_workers(planned.setup, show) as workers:
            show.say(workers.description)
            run = Compression.begin(planned, workers, show)
            published = run.publish_all(restart)
        results = [published[target.folder] for target in planned.targets]
        show.results((item.uri.rsplit("/", 1)[-1], item.manifest["perplexity"]) for item in results)
        for item in results:
            show.say(f"published {item.uri}")
        show.left_out(planned.model.source.name, results[-1].manifest.get("left_out", []))
        return results


def score(recipe: Recipe, display: Display | None = None) -> dict[str, Any]:
    """The recipe's metric for every block of the dense model, on all windows: {"metric", "blocks":
    [{"block", "score"} …], "lowest"} and the protocol (see `Windows.protocol`). "metric" is
    "macro_influence", "kl", "loss" or "block_influence".

    Raises:
        UserError: the recipe cannot be carried out.
    """
    full = recipe.importance.model_copy(update={"all": True, "racing": None})
    with display or Display() as show:
        lengths = {"calibration.length": recipe.calibration.length}
        source, _ = find_model(recipe.model, lengths)
        check_images(
            source, [key for key in recipe.keys_of_images if key.startswith("calibration.")]
        )
        model = open_model(source, show)
        leading = leading_tokens(recipe, model.tokenizer)["calibration"]
        setup = Setup(
            source,
            model.stack,
            recipe.cluster,
            recipe.model.dtype,
            full,
            recipe.calibration.piece_mb,
        )
        with open_workers(setup, show) as workers:
            show.stage("tokenising")
            drawn = calibration_windows(workers, recipe, leading, show, Shared())
            drawn = drawn.first(full.windows)
            windows_WT = drawn.tokens_WT
            check_tokens(source, model.stack, windows_WT)
            compare_source(workers, source, model.stack, windows_WT, show)
            show.calibration(drawn.protocol)
            show.stage(f"scoring {len(model.stack)} blocks on {len(windows_WT)} windows")
            with explained(model.stack, source.name, workers.dtype):
                ranking = score_stack(workers, model.stack, windows_WT, full)
    blocks = [{"block": dense, "score": value} for dense, value in ranking.scores.items()]
    found = {"metric": full.spec.name, "blocks": blocks, "lowest": ranking.lowest}
    return found | drawn.protocol


def evaluate(
    model: str | Sequence[str],
    data: Evaluation | Sequence[Evaluation],
    *,
    revision: str | None = None,
    dtype: str = "auto",
    cluster: Cluster | None = None,
    display: Display | None = None,
) -> dict[str, Any]:
    """Perplexity of any checkpoint, or of several, over consecutive windows of a text, or of
    several; of conversations with images, over their answers: {"results": a row for each model and
    text}.

    A row is {"model", "data", "windows", "length", "bos", "perplexity", "loss", "targets",
    "protocol"}; those of all but the first model have "against", too: the paired difference from
    it (see `bootstrap.Difference.to_json`), or a "problem". The keys of a single row stand beside
    "results" as well.

    Args:
        revision: of a hub model, if there is only one model.

    Raises:
        UserError: a model or a text cannot be used, is given twice, or there is none.
    """
    names = [model] if isinstance(model, str) else list(model)
    texts = [data] if isinstance(data, Evaluation) else list(data)
    check_several(names, texts, revision)
    more = {"revision": revision, "dtype": dtype}
    asked = [Recipe.check(Model, {"source": name, **more}, "model") for name in names]
    several, measured = len(names) > 1, []
    with display or Display() as show:
        opened = []
        for which in asked:
            with naming(which.source if several else ""):
                opened.append(open_for(which, texts, show))
        for number, (which, found) in enumerate(zip(asked, opened, strict=True), 1):
            if several:
                show.say(f"model {number}/{len(names)}: {which.source}")
            setup = Setup(found.source, found.stack, cluster or Cluster(), which.dtype)
            with naming(which.source if several else ""), open_workers(setup, show) as workers:
                measured += measure(workers, found, texts, show)
    results = rows(measured)
    return {**(results[0] if len(results) == 1 else {}), "results": results}


def room_for_sets(
    setups: Sequence[Setup], asked: int | None, quota: float | None, key: str
) -> AbstractContextManager[ResourcePool]:
    """A context in which several sets of workers may be open at once: see `distributed/sets.py`.
    With `cluster.engine: local` it is one.
    """
    if setups[0].cluster.engine == "local":
        return nullcontext(ResourcePool(Room([Need()] * len(setups))))
    from fusegpt_ray.distributed.sets import joined

    return joined(setups, asked, quota, key)


def open_workers(setup: Setup, show: Display) -> Workers:
    """The workers that `cluster.engine` names, to be entered. With `local`, neither ray nor
    deepspeed is imported.
    """
    show.stage(f"starting the {setup.cluster.engine} engine")
    if setup.cluster.engine == "local":
        from fusegpt_ray.workers.local import LocalWorkers

        return LocalWorkers(setup)
    from fusegpt_ray.distributed.cluster import RayWorkers

    return RayWorkers(setup)
