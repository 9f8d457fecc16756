"""The way of weights onto a device, through buffers smaller than the tensors; and what a block
costs to build.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from cached_blocks import blocks_of, entry
from models import open_stack
from safetensors.torch import load_file, save_file
from test_checkpoint import any_tensors, assert_same

from fusegpt_ray.model.cache import BlockCache
from fusegpt_ray.model.empty import load_block
from fusegpt_ray.model.runner import Runner
from fusegpt_ray.model.staging import Staging
from fusegpt_ray.model.trunk import Trunk
from fusegpt_ray.store import ranges
from fusegpt_ray.store.checkpoint import SINGLE, TensorRef, read_index, read_tensors
from fusegpt_ray.store.ranges import EndedEarly

CPU = torch.device("cpu")
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=pytest.mark.gpu,
    ),
]
on_devices = pytest.mark.parametrize("device", DEVICES)
"""On a CPU nothing is pinned and nothing has to be waited for; all else is the same."""


def as_computed(tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }


def on_cpu(tensors: dict[str, torch.Tensor], device: str) -> dict[str, torch.Tensor]:
    assert {tensor.device.type for tensor in tensors.values()} == {device}
    return {name: tensor.cpu() for name, tensor in tensors.items()}


@pytest.fixture
def refs(tmp_path: Path) -> dict[str, TensorRef]:
    """Of every dtype and of unusual shapes, their floating values finite."""
    tensors = any_tensors()
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            tensors[name] = torch.randn(tensor.shape).abs().to(tensor.dtype)
    save_file(tensors, tmp_path / SINGLE)
    return read_index(str(tmp_path), "model.source")


@on_devices
@pytest.mark.parametrize("size", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_tensors_as_the_library_reads(
    device: str, size: int, dtype: torch.dtype, refs: dict[str, TensorRef], tmp_path: Path
) -> None:
    staging, seen = Staging(torch.device(device), dtype, size), bytearray()
    found = staging.read(refs, seen.extend)
    assert_same(on_cpu(found, device), as_computed(load_file(tmp_path / SINGLE), dtype))
    stored = staging.read_as_stored(refs)
    assert_same(on_cpu(stored, device), load_file(tmp_path / SINGLE))
    assert seen == (tmp_path / SINGLE).read_bytes()[min(ref.begin for ref in refs.values()) :]
    some = {"b": refs["scalar"], "a": refs["empty"]}
    assert_same(
        on_cpu(staging.read(some), device),
        as_computed({"b": load_file(tmp_path / SINGLE)["scalar"], "a": torch.zeros(0, 7)}, dtype),
    )
    assert list(staging.read(some)) == ["b", "a"]
    assert staging.read({}) == {}


@on_devices
def test_a_failure_leaves_it_usable(
    device: str, refs: dict[str, TensorRef], tmp_path: Path
) -> None:
    staging = Staging(torch.device(device), torch.float32, 64)
    expected = on_cpu(staging.read(refs), device)
    whole = (tmp_path / SINGLE).read_bytes()
    for kept in (len(whole) - 1, len(whole) - 100, 0):
        (tmp_path / SINGLE).write_bytes(whole[:kept])
        with pytest.raises(EndedEarly):
            staging.read(refs)
        (tmp_path / SINGLE).write_bytes(whole)
        assert_same(on_cpu(staging.read(refs), device), expected)


@on_devices
def test_two_threads_share_its_buffers(device: str, refs: dict[str, TensorRef]) -> None:
    staging = Staging(torch.device(device), torch.float32, 50)
    expected = on_cpu(staging.read(refs), device)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(staging.read, [refs] * 40):
            assert_same(on_cpu(found, device), expected)


@on_devices
def test_an_entry_of_the_cache_goes_the_same_way(
    device: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Fetched and kept on the CPU, then read onto the device, and checked on the way."""
    (refs,) = blocks_of(tmp_path, 1)
    expected = as_computed(read_tensors(refs), torch.bfloat16)
    cache = BlockCache(tmp_path / "cache", None)
    staging = Staging(torch.device(device), torch.bfloat16, 1000)
    assert_same(as_computed(cache.tensors(refs, read=staging.read), torch.bfloat16), expected)
    assert_same(on_cpu(cache.tensors(refs, read=staging.read), device), expected)
    file = entry(cache, refs)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    again = cache.tensors(refs, read=staging.read)
    assert "is damaged" in caplog.text
    assert_same(as_computed({name: t.cpu() for name, t in again.items()}, torch.bfloat16), expected)


@pytest.mark.gpu
def test_blocks_streamed_to_a_gpu_are_those_of_the_cpu(checkpoint: Callable[[str], Path]) -> None:
    stack = open_stack(checkpoint("llama"))
    streaming = Runner(stack, torch.device("cuda"), torch.bfloat16, 2, "streamed")
    on_host = Runner(stack, CPU, torch.bfloat16, 2, "streamed")
    for _ in range(3):
        for block, module in streaming.weights.walk(stack.blocks):
            found = {name: value.cpu() for name, value in module.state_dict().items()}
            assert_same(found, dict(on_host.weights.of(block).state_dict()))


def test_a_block_is_made_of_what_was_read_not_of_a_copy(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = open_stack(checkpoint("llama"))
    trunk, (block, *_) = Trunk(stack, CPU, torch.float32), stack.blocks
    tensors = read_tensors(block.weights)
    module = load_block(trunk.meta_blocks[block.dense], tensors, CPU, torch.float32)
    assert {name: value.data_ptr() for name, value in module.named_parameters()} == {
        name: tensor.data_ptr() for name, tensor in tensors.items()
    }
    monkeypatch.setattr(Staging, "read", None)  # on a CPU nothing goes through buffers
    taken: list[int] = []
    empty = ranges.empty
    monkeypatch.setattr(ranges, "empty", lambda size: (taken.append(size), empty(size))[1])
    runner = Runner(stack, CPU, torch.float32, 2, "streamed")
    taken.clear()
    runner.weights.of(block)
    assert sum(taken) == sum(ref.end - ref.begin for ref in block.weights.values())
