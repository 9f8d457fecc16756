"""What becomes of one class: it is opened, scored, made shallower and published, and the published
model is held against an independent removal.

The comparison uses transformers alone: the dense model is loaded by `from_pretrained`, and each
removed block hands on what enters it. So kept blocks are called exactly as in the dense model.
"""

from __future__ import annotations

import io
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from classes import FIRST_SPECIAL, SPECIAL, blocks_of, random_text, save_class
from rich.console import Console
from torch import nn

from fusegpt_ray.errors import UserError
from fusegpt_ray.pipeline import compress
from fusegpt_ray.recipe.recipe import Recipe
from fusegpt_ray.terminal.display import Display

LENGTH = 16
REMOVED = 2
WANTS_MORE = ("required positional", "have to specify", "must specify exactly one")
WANTS_MORE += ("cannot be None", "has to be not-None", "Bbox is required")
"""What a model says that runs, but not of tokens alone."""
EXACT, REFUSED, FAILS, NOT_BUILT = "exact", "refused", "FAILS", "not built"


@dataclass(frozen=True)
class Outcome:
    """What became of a class, or of one method with it."""

    kind: str
    """One of the four above."""
    why: str = ""
    seconds: float = 0.0
    """How long it took to be refused."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def try_class(name: str, folder: Path, fuse: bool = True) -> dict[str, Outcome]:
    """By method, what becomes of a tiny checkpoint of the class `name`; `fuse`: try that, too."""
    try:
        model = save_class(name, folder / "model")
    except Exception as error:
        # Of whatever kind: a configuration of small numbers need not be one of the class's.
        return {"mi": Outcome(NOT_BUILT, _said(error))}
    dropped = try_method(name, model, folder, "mi")
    if dropped.kind in (REFUSED, FAILS) and (problem := _does_not_run(name, model)):
        return {"mi": Outcome(NOT_BUILT, problem)}
    if dropped.kind != EXACT or not fuse:
        return {"mi": dropped}
    return {"mi": dropped, "fusegpt": try_method(name, model, folder, "fusegpt")}


def try_method(name: str, model: Path, folder: Path, method: str) -> Outcome:
    """Publish the model without two of its blocks, and look at what comes out."""
    out, began = folder / f"out-{method}", time.monotonic()
    try:
        published = publish(model, folder, out, method)
    except UserError as error:
        if out.exists():
            return Outcome(FAILS, f"refused, but only after it wrote: {error}")
        return Outcome(REFUSED, f"{error.problem}. Fix: {error.fix}", time.monotonic() - began)
    except Exception as error:  # the outcome that the sweep is there to find
        return Outcome(FAILS, _said(error))
    try:
        problem = _loads_plainly(name, model, published)
        if not problem and method == "mi":
            problem = _differs(name, model, published)
    except Exception as error:  # of whatever kind: the class itself cannot use what was published
        problem = _said(error)
    return Outcome(FAILS, problem) if problem else Outcome(EXACT)


def publish(model: Path, folder: Path, out: Path, method: str) -> Path:
    """The folder of the model without two of its blocks. In `folder` a text is laid."""
    (folder / "text.txt").write_text(random_text(300))
    with Display(Console(file=io.StringIO(), width=200)) as display:
        (result,) = compress(Recipe.parse(_recipe(model, folder, out, method)), display)
    return Path(result.uri)


@torch.no_grad()
def _does_not_run(name: str, folder: Path) -> str:
    """What the dense model itself says of tokens if it was built of numbers that do not fit."""
    model, _ = _load(name, folder)
    try:
        model(input_ids=torch.full((1, LENGTH), len(SPECIAL)), use_cache=False)
    except Exception as error:
        # Of whatever kind; one that wants more than tokens is refused for good.
        return "" if any(words in str(error) for words in WANTS_MORE) else _said(error)
    return ""


def _recipe(model: Path, folder: Path, out: Path, method: str) -> dict[str, Any]:
    return {
        "model": {"source": str(model)},
        "preset": "rounds",
        "method": method,
        "sparsity": 0.3,
        "calibration": {"data": str(folder / "text.txt"), "windows": 4, "length": LENGTH},
        "importance": {"windows": 2, "batch": 2},
        "fusion": {"group_size": 2, "rank": 2, "lora_rank": 2, "epochs": 1, "batch": 2},
        "cluster": {"engine": "local"},
        "output": {"uri": str(out), "name": "tiny", "report": False, "samples": []},
    }


def _said(error: BaseException) -> str:
    """In one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _load(name: str, folder: Path) -> tuple[tf.PreTrainedModel, dict[str, Any]]:
    loaded = getattr(tf, name).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    return loaded[0].eval(), loaded[1]


def _loads_plainly(name: str, dense: Path, folder: Path) -> str:
    """What `from_pretrained` has to say of a published model that it has not of the dense one."""
    model, report = _load(name, folder)
    before, known = _load(name, dense)
    for kind, keys in report.items():
        if keys and not known.get(kind):
            return f"from_pretrained reports {kind} {sorted(map(str, keys))[:3]}"
    if model.all_tied_weights_keys != before.all_tied_weights_keys:
        return "other weights are tied"
    return ""


@torch.no_grad()
def _differs(name: str, dense: Path, folder: Path) -> str:
    """How the published model differs from the dense one without its blocks, or nothing."""
    kept = json.loads((folder / "fusegpt.json").read_text())["kept"]
    (whole, _), (published, _) = _load(name, dense), _load(name, folder)
    depth = whole.config.get_text_config().num_hidden_layers
    if len(kept) != depth - REMOVED:
        return f"{len(kept)} of {depth} blocks are left"
    for number, block in enumerate(blocks_of(whole, depth)):
        if number not in kept:
            block.register_forward_hook(_hands_on, with_kwargs=True)
    ids = torch.randint(
        len(SPECIAL), FIRST_SPECIAL, (2, LENGTH), generator=torch.Generator().manual_seed(2)
    )
    wanted, found = (model(input_ids=ids, use_cache=False).logits for model in (whole, published))
    if not wanted.isfinite().all() or not wanted.std() > 0:
        return "the dense model's logits are not finite, or all the same: nothing is compared"
    if not torch.equal(found, wanted):
        return f"logits differ by {(found - wanted).abs().max().item():.3g}"
    said = _generates_otherwise(published, ids[:1])
    return said if said and not _generates_otherwise(_load(name, dense)[0], ids[:1]) else ""


def _generates_otherwise(model: tf.PreTrainedModel, ids: torch.Tensor) -> str:
    """Whether generating with a cache gives other tokens than without."""
    if not model.can_generate():
        return ""
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    try:
        cached, plain = (model.generate(ids, use_cache=use, **options) for use in (True, False))
    except Exception as error:  # of whatever kind; the dense model may do no better
        return f"does not generate: {_said(error)}"
    return "" if torch.equal(cached, plain) else "generates other tokens with a cache than without"


def _hands_on(_: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
    entered = args[0] if args else kwargs["hidden_states"]
    return type(out)((entered, *out[1:])) if isinstance(out, tuple | list) else entered
