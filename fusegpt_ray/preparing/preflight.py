"""Finds mistakes in a recipe before any weights are read and before anything is written."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from fusegpt_ray.errors import StorageError, UserError, blaming, reading_users_file
from fusegpt_ray.fusion.compensation import (
    fitted_windows,
    last_linears,
    needed_tokens,
    needed_windows,
)
from fusegpt_ray.fusion.student import all_layers
from fusegpt_ray.fusion.writers import mixers, writers
from fusegpt_ray.methods import METHODS
from fusegpt_ray.model.config import KEY, read_config
from fusegpt_ray.model.source import MANIFEST, Source
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.model.structure import Structure, observe
from fusegpt_ray.recipe.recipe import Recipe
from fusegpt_ray.run.begun import check_place
from fusegpt_ray.run.budget import refuse_unpriced
from fusegpt_ray.run.identity import same_way, settings
from fusegpt_ray.run.journal import ANEW, Journal
from fusegpt_ray.samples import Batch, tokens_of
from fusegpt_ray.store import storage
from fusegpt_ray.store.manifest import Manifest
from fusegpt_ray.targets import Target
from fusegpt_ray.text.images import check_pillow
from fusegpt_ray.workers.base import Workers


def check_model(source: Source, lengths: dict[str, int]) -> Structure:
    """The structure of a model's blocks, once it is clear that the model can be used with windows
    of these lengths (recipe key → tokens).

    Raises:
        UserError: see `Source.config`, `observe`; or a window is longer than the model's positions.
    """
    raw = source.config()
    structure = observe(raw)
    positions = getattr(read_config(raw).get_text_config(), "max_position_embeddings", None)
    for key, length in lengths.items():
        if positions and 0 < positions < length:  # some classes say -1 for any number
            raise UserError(
                key,
                length,
                f"longer than the model's {positions} positions",
                f"use at most {positions}",
            )
    return structure


def check_method(recipe: Recipe, structure: Structure) -> None:
    """
    Raises:
        UserError: the method fuses or trains linear layers, and most of a block lies elsewhere.
    """
    blocks = structure.blocks
    linear = sum(layer.weight.numel() for block in blocks for layer in all_layers(block).values())
    share = linear / sum(value.numel() for block in blocks for value in block.parameters())
    low_rank = recipe.heal is not None and recipe.heal.train == "lora"
    if (recipe.trains_groups or low_rank) and share < 0.5:
        problem = (
            f"only {share:.0%} of the blocks of {structure.name} are linear layers, or experts as"
            " transformers usually keeps them"
        )
        if not recipe.trains_groups:
            fix = "use all, or leave heal out"
            raise UserError("heal.train", "lora", problem, fix)
        fix = "use method: mi, which only removes blocks"
        raise UserError("method", recipe.method, problem, fix)


def check_copies(recipe: Recipe, structure: Structure) -> None:
    """
    Raises:
        UserError: copies that are to begin as nothing cannot, in this architecture.
    """
    growth = METHODS[recipe.method].growth
    if growth and growth.zero:
        copies = growth.place(recipe, len(structure.blocks))
        writers(structure, [copy.like for copy in copies])


def check_light(recipe: Recipe, structure: Structure) -> None:
    """
    Raises:
        UserError: an MLP is asked for in place of a run, and a block has none by itself.
    """
    if recipe.spec.light and recipe.fusion.light == "mlp":
        mixers(structure, 0)


def with_start(recipe: Recipe, structure: Structure, say: Callable[[str], None]) -> Recipe:
    """The recipe with `fusion.start: auto` decided, and any other start checked.

    Raises:
        UserError: see `check_repair`.
    """
    if recipe.fusion.start != "auto":
        check_repair(recipe, structure)
        return recipe

    def starting(way: str) -> Recipe:
        fusion = recipe.fusion.model_copy(update={"start": way})
        return recipe.model_copy(update={"fusion": fusion})

    linear = starting("linear")
    try:
        check_repair(linear, structure)
    except UserError as error:
        say(f"groups are trained without a start in closed form: {error.problem}")
        return starting("none")
    return linear


def check_repair(recipe: Recipe, structure: Structure) -> None:
    """
    Raises:
        UserError: no block ends in a linear layer that could be changed, blocks are called with
            what depends on the sample, or the calibration windows have too few tokens for the
            repair's least squares, even if all are different (see `Repair.on`).
    """
    way, text, batch = recipe.fusion.start, recipe.calibration, recipe.importance.batch
    assert way != "auto", "it is decided"
    if way == "none":
        return
    fix = "use method: mi" if recipe.method == "mi+linear" else "use none"
    if any(map(recipe.sees, text.parts)) or structure.by_sample:
        problem = (
            "repairs in closed form are not made where blocks are called with what depends on the"
            " sample, as with images"
        )
        raise UserError("fusion.start", way, problem, fix)
    unseen = "what its blocks compute cannot be seen without values"
    with reading_users_file(KEY, structure.name, unseen, "leave fusion.start out, with method mi"):
        layers = last_linears(structure.calls).values()
    if not layers:
        problem = (
            f"it changes the linear layer that a block ends in, and no block of {structure.name}"
            " ends in one; a mixture's experts are many"
        )
        raise UserError("fusion.start", way, problem, fix)
    needed = max(needed_tokens(way, layer) for layer in layers)
    fitted = fitted_windows(text.windows, batch) * text.length
    if fitted < needed:
        problem = (
            f"fusion.start: {way} has {needed} unknowns for each output, and the windows have "
            f"{fitted} tokens, an eighth of them held out"
        )
        multiple = recipe.fusion.batch if recipe.trains_groups else 1
        windows = needed_windows(needed, text.length, batch, multiple)
        raise UserError("calibration.windows", text.windows, problem, f"use at least {windows}")


def check_images(source: Source, asked: Sequence[str]) -> None:
    """
    Args:
        asked: the recipe keys that ask for images.

    Raises:
        UserError: pillow is not installed, the model sees no images, or it has no processor.
    """
    for key in asked[:1]:
        check_pillow(key)
        if image_token(source) is None:
            problem = (
                f"{source.name} is a model of text alone, or its class has no token for an image"
            )
            fix = "use a model that sees, such as LLaVA, Qwen2-VL or Gemma 3, or leave images out"
            raise UserError(key, True, problem, fix)
        source.processor()


def image_token(source: Source) -> int | None:
    """The placeholder that an image's embeddings replace; None: the model sees no images."""
    config = read_config(source.config())
    found = (getattr(config, name, None) for name in ("image_token_id", "image_token_index"))
    return next((token for token in found if token is not None), None)


def check_tokens(source: Source, dense: Stack, *texts: Batch) -> None:
    """
    Raises:
        UserError: the tokenizer gives tokens that the model has no embedding for.
    """
    known = read_config(dense.config).get_text_config().vocab_size
    largest = max(int(tokens_of(windows).max()) for windows in texts)
    if largest >= known:
        problem = f"its tokenizer gives the token {largest}, its config.json knows {known} tokens"
        raise UserError(
            "model.source", source.name, problem, "use the tokenizer that belongs to the weights"
        )


def check_price(workers: Workers) -> None:
    """Before texts are drawn: the dense model may have to write them first. Workers are asked only
    if it matters, because on Ray replicas have to start for the answer.

    Raises:
        UserError: see `refuse_unpriced`; of the GPU of these workers.
    """
    cluster = workers.setup.cluster
    if cluster.max_cost is not None and isinstance(cluster.gpu_hour_price, dict):
        refuse_unpriced(cluster, [workers.hardware.get("gpu", "")])


def check_output(
    recipe: Recipe,
    targets: list[Target],
    restart: bool = False,
    writes: bool = True,
    extends: bool = False,
) -> None:
    """Check that the models can be written. It leaves nothing behind.

    The same command may be given again after its end, as by a scheduler that did not hear of it:
    `pipeline` finds what it published.

    Args:
        restart: an unfinished run of that name will be forgotten.
        writes: whether a file may be written for a moment; else only what can be seen is checked.
        extends: some of the targets may be finished, made by the same settings at whatever
            sparsities, and stay.

    Raises:
        UserError: files cannot be created below `output.uri`, a finished model, a file or a folder
            of somebody's files already has the name of a target, or an unfinished run of other
            settings has the recipe's name.
    """
    try:
        storage.filesystem(recipe.output.uri)
    except (ValueError, ImportError) as error:  # the protocol is unknown, or its package is missing
        raise _unwritable("output.uri", recipe.output.uri, error) from error
    with blaming("output.uri", recipe.output.uri):
        if not restart and all(_published_by(recipe, target) for target in targets):
            return
        if extends:
            targets = [target for target in targets if not _finished_alike(recipe, target)]
        _check_places(recipe, targets, restart)
        probe = f"{recipe.output.name}.write-test"
        check_writable("output.uri", recipe.output.uri, probe, writes)


def _published_by(recipe: Recipe, target: Target) -> bool:
    """Whether the target is a finished model that was made from this very recipe, as far as its
    manifest says.
    """
    made_by, dumped = Manifest.recipe_of(target.folder), recipe.model_dump(mode="json")
    return made_by is not None and made_by | {"cluster": None} == dumped | {"cluster": None}


def _finished_alike(recipe: Recipe, target: Target) -> bool:
    """Whether the target is a finished model that a recipe of the same settings made, as far as its
    manifest says.

    Raises:
        UserError: one did, and it was measured on other texts.
    """
    if (made_by := Manifest.recipe_of(target.folder)) is None:
        return False
    if not same_way(recipe, made_by):
        return False
    if made_by.get("evaluation") != recipe.model_dump(mode="json")["evaluation"]:
        problem = (
            f"the finished model at {target.folder} was measured otherwise, and is not changed"
        )
        fix = "give another output.name, so that all is made and measured anew, or remove the model"
        raise UserError("evaluation", [*recipe.evaluation], problem, fix)
    return True


def _check_places(recipe: Recipe, targets: list[Target], restart: bool) -> None:
    for folder in (*(target.folder for target in targets), Journal.of(recipe).folder):
        if "://" not in folder and Path(folder).exists() and not Path(folder).is_dir():
            problem = f"a file is in the way at {folder}"
            raise UserError(
                "output.name",
                recipe.output.name,
                problem,
                "choose another output.name, or remove the file",
            )
    finished = [
        target for target in targets if storage.exists(storage.join(target.folder, MANIFEST))
    ]
    # A run of several sparsities that died between two of them goes on; `pipeline` makes sure that
    # the finished ones are its own.
    if finished and (restart or len(finished) == len(targets) or not Journal.of(recipe).started):
        raise name_taken(recipe, finished[0])
    for target in targets:
        check_place(target.folder)
    if not restart:
        moved = f"{ANEW} (once {finished[0].folder} is moved or removed)" if finished else ANEW
        Journal.of(recipe).check(settings(recipe), moved)


def name_taken(recipe: Recipe, target: Target) -> UserError:
    problem = f"a finished model is already at {target.folder}"
    return UserError(
        "output.name",
        recipe.output.name,
        problem,
        "choose another output.name or output.uri, or remove it",
    )


def check_writable(key: str, uri: str, probe: str, writes: bool = True) -> None:
    """Check that files can be made below a URI. It leaves nothing behind.

    Args:
        probe: the name of a file that is not there, which an object store is asked to take.
        writes: see `check_output`.

    Raises:
        UserError: they cannot.
    """
    place = storage.absolute(uri)
    try:
        if "://" in place:
            if writes:
                file = storage.join(place, probe)
                storage.write(file, b"")
                storage.remove(file)
            return
        # A link to nothing is there, too: the probe must fail on it.
        there = next(
            folder for folder in (Path(place), *Path(place).parents) if os.path.lexists(folder)
        )
        if writes:
            tempfile.TemporaryFile(dir=there).close()
        elif not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise PermissionError(f"{there} is no folder that may be written to")
    except StorageError:
        raise
    except OSError as error:
        raise _unwritable(key, uri, error) from error


def _unwritable(key: str, uri: str, error: Exception) -> UserError:
    problem = f"cannot be written ({error})"
    return UserError(key, uri, problem, "check the path and your rights")
