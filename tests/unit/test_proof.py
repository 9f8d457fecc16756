"""What is wrong with a published model is found before its manifest is written, whatever it is and
wherever it happened."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
import torch
from desk import Desk
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from models import MODELS, load_model, open_stack, rewrite, token_windows
from safetensors.torch import load_file, save_file

from fusegpt_ray.cli import main
from fusegpt_ray.model.runner import Runner
from fusegpt_ray.model.source import MANIFEST, Source
from fusegpt_ray.model.stack import Block, Stack
from fusegpt_ray.pipeline import compress
from fusegpt_ray.publishing.plain import compare_plain
from fusegpt_ray.publishing.proof import ProofError, compare, open_published, prove, read_back
from fusegpt_ray.publishing.publish import publish
from fusegpt_ray.publishing.shrink import model_entries
from fusegpt_ray.recipe import Recipe
from fusegpt_ray.store import storage
from fusegpt_ray.store.checkpoint import SINGLE, FileRecord, read_header

Tensors = dict[str, torch.Tensor]
KEPT = [0, 2, 4]


# --- a store that does not keep what it is given ---


class Mischief(DirFileSystem):
    """A folder of this machine in which some files arrive otherwise than they were sent."""

    protocol = "mischief"
    cachable = False
    spoil: ClassVar[dict[str, Callable[[Path], None]]] = {}
    """By what a file's path ends with: what happens to it when it is written for the first time."""

    def __init__(self, **options: Any) -> None:
        super().__init__(path="/", fs=LocalFileSystem(auto_mkdir=True), **options)

    def open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        file = super().open(path, mode, **options)
        return _Spoiling(file, Path("/" + path.lstrip("/"))) if "w" in mode else file

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        if mode == "create" and self.exists(path):
            raise FileExistsError(path)
        with self.open(path, "wb") as file:
            file.write(value)


class _Spoiling:
    def __init__(self, file: Any, path: Path) -> None:
        self.file, self.path = file, path

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> _Spoiling:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.file.close()
        for end, spoil in list(Mischief.spoil.items()):
            if str(self.path).endswith(end):
                del Mischief.spoil[end]
                spoil(self.path)


@pytest.fixture
def mischief() -> Iterator[dict[str, Callable[[Path], None]]]:
    fsspec.register_implementation("mischief", Mischief, clobber=True)
    Mischief.spoil.clear()
    yield Mischief.spoil
    Mischief.spoil.clear()


def flip_last_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def lose_the_end(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def lose_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


SPOILED = {
    "a-flipped-bit": (SINGLE, flip_last_bit, "another checksum"),
    "a-lost-end": (SINGLE, lose_the_end, "bytes in the store"),
    "half-a-file": (SINGLE, lose_half, "bytes in the store"),
    "an-empty-file": ("config.json", empty, "0 bytes in the store"),
    "a-flipped-bit-in-json": ("config.json", flip_last_bit, "another checksum"),
    "a-flipped-bit-in-the-tokenizer": ("tokenizer.json", flip_last_bit, "another checksum"),
    "a-flipped-bit-in-the-card": ("README.md", flip_last_bit, "another checksum"),
    "a-lost-file": (SINGLE, Path.unlink, SINGLE),
}


@pytest.mark.parametrize(("name", "spoil", "problem"), SPOILED.values(), ids=SPOILED)
def test_what_did_not_arrive_as_sent_fails_the_run(
    name: str,
    spoil: Callable[[Path], None],
    problem: str,
    mischief: dict[str, Callable[[Path], None]],
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    desk = Desk.make(tmp_path, checkpoint("llama"))
    command = [
        "compress",
        desk.write(method="mi", output={"uri": f"mischief://{desk.out}", "name": "demo"}),
    ]
    mischief[f"demo-p40/{name}"] = spoil
    assert main(command) == 1
    assert mischief == {}, "nothing was spoiled"
    failed = [line for line in capsys.readouterr().err.splitlines() if line.startswith("failed: ")]
    assert len(failed) == 1 and f"demo-p40/{name}" in failed[0] and problem in failed[0]
    assert not list(desk.out.glob("*/fusegpt.json"))

    assert main(command) == 0
    assert len(list(desk.out.glob("*/fusegpt.json"))) == 1


# --- a model that is not the one it should be ---


def shortened(dense: Stack) -> Stack:
    stack = dense
    for block in set(dense.kept) - set(KEPT):
        stack = stack.drop(block)
    return stack


@pytest.fixture
def folder(checkpoint: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """Name of a tiny model → the folder of its published, shorter form."""

    def get(name: str) -> Path:
        dense = open_stack(checkpoint(name))
        out = tmp_path / name
        publish(
            str(out),
            shortened(dense),
            dense,
            Source.find(str(checkpoint(name)), None),
            10**9,
            FACTS,
        )
        return out

    return get


FACTS: dict[str, Any] = {
    "method": "mi",
    "sparsity": 0.4,
    "recipe": {},
    "removed": [1, 3],
    "rounds": [],
    "perplexity": {},
}


def opened(folder: Path, dense: Stack) -> Stack:
    entries = {entry.name: entry for entry in model_entries(shortened(dense), dense)}
    return open_published(str(folder), entries, dense)


def without(tensors: Tensors, *names: str) -> Tensors:
    return {name: value for name, value in tensors.items() if name not in names}


Q = "model.layers.1.self_attn.q_proj.weight"
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


def with_block(
    dense: Stack, folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor]
) -> Stack:
    """The shorter stack with a block as fine-tuning writes it, changed."""
    stack = shortened(dense)
    tensors = load_file(Path(dense.blocks[2].weights["self_attn.q_proj.weight"].file))
    work = {
        name: change(name, tensors[f"model.layers.2.{name}"].float())
        for name in dense.blocks[2].weights
    }
    save_file(work, folder / "work.safetensors")
    return stack.swap({2: Block(2, read_header(str(folder / "work.safetensors"), "work"))})


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


# --- a model that computes something else ---

IDS = token_windows(2, 9)


def runners(dense: Stack, published: Stack) -> tuple[Runner, Runner]:
    return Runner(dense, torch.device("cpu"), torch.float32, 8), Runner(
        published, torch.device("cpu"), torch.float32, 8
    )


@pytest.mark.parametrize("name", [*MODELS])
def test_an_honest_model_is_proven_exactly(
    name: str, folder: Callable[[str], Path], checkpoint: Callable[[str], Path]
) -> None:
    out, dense = folder(name), open_stack(checkpoint(name))
    published = opened(out, dense)
    proof = prove(published, str(out), shortened(dense), *runners(dense, published), IDS)
    assert proof.states == 0
    assert proof.kl < 1e-12
    assert proof.plain_kl is not None and proof.plain_kl < 1e-9


def test_rounding_to_the_published_dtype_is_no_difference(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    load_model(checkpoint("llama")).bfloat16().save_pretrained(tmp_path / "source")
    dense = open_stack(tmp_path / "source")
    stack = with_block(dense, tmp_path, lambda _, tensor: tensor + 1e-3 * torch.randn_like(tensor))
    publish(
        str(tmp_path / "out"),
        stack,
        dense,
        Source.find(str(tmp_path / "source"), None),
        10**9,
        FACTS,
    )
    published = Source.find(str(tmp_path / "out"), None).stack()
    assert (
        {ref.code for ref in published.blocks[1].weights.values()}
        == {"BF16"}
        != {ref.code for ref in stack.blocks[1].weights.values()}
    )
    assert compare(published, stack, *runners(dense, published), IDS) == (0, 0)


def swapped(tensors: Tensors) -> Tensors:
    """Two blocks have changed places."""
    other = {"0": "1", "1": "0"}
    return {
        re.sub(r"layers\.([01])\.", lambda m: f"layers.{other[m[1]]}.", name): value
        for name, value in tensors.items()
    }


def nudged(name: str, by: float) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: tensors[name] * (1 + by)}


OTHER = {
    "swapped": (swapped, r"block 0 \(block 0 of the dense model\) is off"),
    "nudged": (
        nudged("model.layers.2.mlp.down_proj.weight", 0.01),
        r"block 2 \(block 4 of the dense model\) is off",
    ),
    "embedding": (nudged("model.embed_tokens.weight", 0.01), "its embedding is off"),
    "head": (
        nudged("lm_head.weight", 0.1),
        r"logits differ from the stack's: mean KL .* nats a token",
    ),
}


@pytest.mark.parametrize(("change", "problem"), OTHER.values(), ids=OTHER)
def test_other_values_are_found_by_running_them(
    change: Callable[[Tensors], Tensors],
    problem: str,
    folder: Callable[[str], Path],
    checkpoint: Callable[[str], Path],
) -> None:
    out, dense = folder("llama"), open_stack(checkpoint("llama"))
    rewrite(out, out, change)
    published = opened(out, dense)  # names and shapes are right
    with pytest.raises(ProofError, match=problem):
        compare(published, shortened(dense), *runners(dense, published), IDS)


def test_another_attention_pattern_is_found(
    folder: Callable[[str], Path], checkpoint: Callable[[str], Path]
) -> None:
    """A setting with one value a block, out of step: only running the model shows it."""
    out, dense = folder("gemma3"), open_stack(checkpoint("gemma3"))
    config = json.loads((out / "config.json").read_text())
    assert config["layer_types"] == ["sliding_attention"] * 3
    (out / "config.json").write_text(
        json.dumps(
            config | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
        )
    )
    published = opened(out, dense)
    with pytest.raises(ProofError, match=r"block 1 \(block 2 of the dense model\) is off"):
        compare(published, shortened(dense), *runners(dense, published), IDS)


def test_what_from_pretrained_makes_of_it_counts(
    folder: Callable[[str], Path], checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    out, dense = folder("llama"), open_stack(checkpoint("llama"))
    published = opened(out, dense)
    here, there = runners(dense, published)
    other = rewrite(out, tmp_path / "other", nudged("lm_head.weight", 0.1))
    with pytest.raises(ProofError, match="from_pretrained loads differ from the streamed ones"):
        prove(published, str(other), shortened(dense), here, there, IDS)
    less = rewrite(out, tmp_path / "less", lambda tensors: without(tensors, Q))
    assert Q in compare_plain(str(less), published, there, IDS).problem


# --- in a run ---


def test_the_manifest_tells_of_the_proof_and_of_the_published_weights(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    load_model(checkpoint("llama")).bfloat16().save_pretrained(tmp_path / "bf16")
    desk = Desk.make(tmp_path / "desk", tmp_path / "bf16")
    held_out = {"heldout": {"data": str(desk.heldout)}}
    (done,) = compress(Recipe.parse(desk.recipe(evaluation=held_out)))
    assert done.manifest["proof"]["states"] == 0
    assert done.manifest["proof"]["kl"] < 1e-9 and done.manifest["proof"]["plain_kl"] < 1e-6

    from fusegpt_ray.pipeline import evaluate
    from fusegpt_ray.sections import Cluster, Evaluation

    length = done.manifest["perplexity"]["heldout"]["length"]
    text = Evaluation(data=str(desk.heldout), length=length)
    found = evaluate(done.uri, text, cluster=Cluster(engine="local"))
    assert found["perplexity"] == done.manifest["perplexity"]["heldout"]["fused"]
