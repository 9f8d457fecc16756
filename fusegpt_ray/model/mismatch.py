"""Why the tensors of a checkpoint are not those of the model that its config.json describes, in
words.

Only called once they differ: what is known of the common ways in which checkpoints go wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping

from fusegpt_ray.errors import UserError
from fusegpt_ray.model.config import KEY
from fusegpt_ray.store.checkpoint import TensorRef

_QUANTIZED = re.compile(
    r"(^|[._])(qweight|qzeros|scales|g_idx|weight_packed|weight_scale(_inv)?|weight_zero_point|input_scale"
    r"|absmax|quant_map|nested_absmax|SCB|CB|weight_format|blocks_scales)$|\.quant_state\."
)
"""How GPTQ, AWQ, compressed-tensors, fp8 and bitsandbytes call what they add."""
_BELONGS = "use the config.json that belongs to the weights"


def refuse(
    tensors: Mapping[str, TensorRef],
    expected: Collection[str],
    rename: Callable[[str], str],
    missing: Collection[str],
    extra: Collection[str],
) -> None:
    """For a checkpoint that lacks the model's tensors `missing`, or has others (`extra`, as on
    disk).

    `expected`: all names of the model; `rename`: from a name on disk to the model's.

    Raises:
        UserError: always; the message says what the checkpoint seems to be.
    """
    if quantized := sorted(name for name in extra if _QUANTIZED.search(name)):
        problem = (
            f"quantized weights ({len(quantized)} tensors of this kind), which cannot be fused"
        )
        raise UserError(KEY, quantized[0], problem, "use the checkpoint in its original dtype")
    if adapters := sorted(
        name for name in extra if re.search(r"[._]lora_|\.hada_|\.oft_|\.vera_", name)
    ):
        problem = (
            f"the weights of an adapter are among those of the model ({len(adapters)} tensors), not"
            " merged into them"
        )
        raise UserError(
            KEY,
            adapters[0],
            problem,
            "merge it first: model.merge_and_unload().save_pretrained(folder)",
        )
    for what, strip in _wrappings(extra, expected):
        if missing and {*missing} <= {rename(strip(name)) for name in tensors}:
            problem = (
                f"the names of its tensors are wrapped: {what} stands in them, and without it they"
                " are the model's"
            )
            fix = (
                "save the model inside the wrapper with its own save_pretrained, or rename the"
                " tensors"
            )
            raise UserError(KEY, min(extra), problem, fix)
    if missing:
        problem = f"the checkpoint lacks {len(missing)} tensors of the model"
        fix = "download it again"
        if extra:
            problem += f" and has {len(extra)} others, such as {min(extra)}"
            fix += f", or {_BELONGS}"
        raise UserError(KEY, min(missing), problem, fix)
    problem = (
        f"the checkpoint has {len(extra)} tensors that the model of its config.json does not use"
    )
    raise UserError(KEY, min(extra), problem, _BELONGS)


def _wrappings(
    extra: Collection[str], expected: Collection[str]
) -> Iterator[tuple[str, Callable[[str], str]]]:
    """Ways in which names may be wrapped: in words, and what takes it away."""
    first = min(extra, key=len, default="").split(".")
    for length in range(1, len(first)):
        prefix = ".".join(first[:length]) + "."
        yield prefix, lambda name, prefix=prefix: name.removeprefix(prefix)  # type: ignore[misc]
    known = {part for name in expected for part in name.split(".")}
    strange = {part for name in extra for part in name.split(".")[:-1]} - known
    if strange:
        parts = ", ".join(f"{part}." for part in sorted(strange)[:3])
        yield parts, lambda name: ".".join(part for part in name.split(".") if part not in strange)


def refuse_empty(name: str, shape: Collection[int], wanted: Collection[int]) -> None:
    """For a tensor without a single number where the model has some.

    Raises:
        UserError: always.
    """
    problem = f"saved empty: its shape is {list(shape)} and by config.json {list(wanted)}"
    fix = (
        "save the model again so that its weights are gathered first; DeepSpeed ZeRO-3 leaves them"
        " empty without stage3_gather_16bit_weights_on_model_save, and zero_to_fp32.py makes whole"
        " ones of its checkpoints"
    )
    raise UserError(KEY, name, problem, fix)


def refuse_beyond(name: str, found: int, depth: int) -> None:
    """For a tensor of a block beyond the last one; the checkpoint has `found` blocks.

    Raises:
        UserError: always.
    """
    problem = f"its weights have {found} blocks, its config.json says {depth}"
    fix = "use the config.json of these weights"
    if found == depth + 1:
        problem += (
            "; one more may be a layer that predicts further tokens (MTP), which transformers does"
            " not run"
        )
        fix += ", or take the tensors of such a layer out of the checkpoint"
    raise UserError(KEY, name, problem, fix)
