"""A published model whose tensors are not the stack's, or hold NaN or Inf, gets no manifest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import open_stack, rewrite
from proving import FACTS, Q, Tensors, _folder, opened, with_block, without  # noqa: F401 - fixtures
from safetensors.torch import save_file

from fusegpt_ray.model.source import MANIFEST, Source
from fusegpt_ray.publishing.proof import ProofError, read_back
from fusegpt_ray.publishing.publish import publish
from fusegpt_ray.store import storage
from fusegpt_ray.store.checkpoint import SINGLE, FileRecord

WRONG: dict[str, tuple[str, Callable[[Tensors], Tensors], str]] = {
    "missing": ("llama", lambda t: without(t, Q), f"lacks the tensor {Q}"),
    "missing-norm": (
        "llama",
        lambda t: without(t, "model.norm.weight"),
        "lacks the tensor model.norm.weight",
    ),
    "extra": (
        "llama",
        lambda t: t | {"model.layers.3.mlp.up_proj.weight": t[Q].clone()},
        "which the model does not have",
    ),
    "untied-head": (
        "llama-tied",
        lambda t: t | {"lm_head.weight": torch.randn_like(t["model.embed_tokens.weight"])},
        "holds lm_head.weight, which the model does not have",
    ),
    "empty": ("llama", lambda t: t | {Q: torch.empty(0, 32)}, rf"{Q} is \[0, 32\]"),
    "shape": ("llama", lambda t: t | {Q: t[Q].reshape(16, 64)}, rf"{Q} is \[16, 64\]"),
    "dtype": ("llama", lambda t: t | {Q: t[Q].half()}, rf"{Q} is \[32, 32\] torch.float16"),
}


@pytest.mark.parametrize(("name", "change", "problem"), WRONG.values(), ids=WRONG)
def test_other_tensors_than_the_stacks(
    name: str,
    change: Callable[[Tensors], Tensors],
    problem: str,
    folder: Callable[[str], Path],
    checkpoint: Callable[[str], Path],
) -> None:
    out, dense = folder(name), open_stack(checkpoint(name))
    opened(out, dense)
    rewrite(out, out, change)
    with pytest.raises(ProofError, match=problem):
        opened(out, dense)


@pytest.mark.parametrize(("name", "tied"), [("llama-tied", False), ("llama", True)])
def test_another_tie_than_the_dense_models(
    name: str, tied: bool, folder: Callable[[str], Path], checkpoint: Callable[[str], Path]
) -> None:
    out, dense = folder(name), open_stack(checkpoint(name))
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": tied}))
    with pytest.raises(
        ProofError, match="newly tied" if tied else "lacks 1 tensors|no longer tied"
    ):
        opened(out, dense)


def test_a_shard_of_an_earlier_attempt(
    folder: Callable[[str], Path], checkpoint: Callable[[str], Path]
) -> None:
    out = folder("llama")
    stray = "model-00001-of-00002.safetensors"
    shutil.copyfile(out / SINGLE, out / stray)
    with pytest.raises(
        ProofError, match=f"holds {stray}, which is not part of this model: remove it"
    ):
        opened(out, open_stack(checkpoint("llama")))


NAN, INF = float("nan"), float("inf")
NOT_FINITE = [
    (dtype, value)
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for value in (NAN, INF, -INF)
]


@pytest.mark.parametrize(
    ("dtype", "value"), [*NOT_FINITE, (torch.float8_e4m3fn, NAN)]
)  # which has no Inf
@pytest.mark.parametrize("place", [0, 500, 999], ids=["first", "middle", "last"])
def test_nan_and_inf_are_found_wherever_they_are(
    dtype: torch.dtype, value: float, place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "STEP", 333)  # steps that cut elements in two
    good, bad = torch.randn(1000).to(dtype), torch.randn(1000).to(dtype)
    bad[place] = value
    path = tmp_path / "one.safetensors"
    mask = torch.full((9,), -1)  # integers whose bits would be NaN
    for tensors in ({"a": good, "m": mask}, {"a": good, "b": bad, "m": mask, "z": good.clone()}):
        save_file(tensors, path)
        if "b" not in tensors:
            read_back(str(path), FileRecord.of(path.read_bytes()))
    with pytest.raises(ProofError, match="b holds NaN or Inf"):
        read_back(str(path), FileRecord.of(path.read_bytes()))


def test_nan_in_a_fused_block_is_not_published(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    def poisoned(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return (
            tensor.index_fill(0, torch.tensor([3]), float("nan"))
            if name == "mlp.down_proj.weight"
            else tensor
        )

    dense = open_stack(checkpoint("llama"))
    stack = with_block(dense, tmp_path, poisoned)
    with pytest.raises(
        ProofError, match=r"model\.layers\.1\.mlp\.down_proj\.weight holds NaN or Inf"
    ):
        publish(
            str(tmp_path / "out"),
            stack,
            dense,
            Source.find(str(checkpoint("llama")), None),
            10**9,
            FACTS,
        )
    assert not (tmp_path / "out" / MANIFEST).exists()
