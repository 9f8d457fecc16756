"""Large files of training checkpoints are read piece by piece, and held once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from faulty import failing

from fusegpt_ray.store import ranges
from fusegpt_ray.store.fence import nobody_else
from fusegpt_ray.store.writer import entries_of, write_safetensors
from fusegpt_ray.training.checkpoints import Checkpoints, Progress

ROOT = Path(__file__).parents[2]


def made(folder: Path, numbers: int) -> dict[str, torch.Tensor]:
    """A checkpoint of one worker, of several tensors of so many numbers together."""
    there, so_far = checkpoints(str(folder)), Progress([1.0])
    state = {f"part-{part}": torch.rand(numbers // 8) for part in range(8)}
    file, _ = write_safetensors(there._uri(so_far, 0), entries_of(state))
    there._write(so_far, {there._name(so_far, 0): file})
    return state


def checkpoints(folder: str) -> Checkpoints:
    return Checkpoints.find(folder, 0, {"origin": "here"}, 4, nobody_else)


def test_a_piece_that_fails_is_read_again_and_not_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "PIECE", 4096)
    monkeypatch.setenv("FUSEGPT_RETRY_SECONDS", "5")
    state, failed = made(tmp_path, 20_000), list[int]()

    def once(name: str, begin: int, data: bytes) -> bytes:
        assert len(data) <= 8192, "a piece, or a header"
        if name.endswith(".safetensors") and begin > 40_000 and not failed:
            failed.append(begin)
            raise ConnectionError("as if")
        return data

    with failing(once) as asked:
        so_far, found = checkpoints(f"faulty://{tmp_path}")._read(0, print)
    assert so_far.means == [1.0] and found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    begins = [begin for name, begin in asked if name.endswith(".safetensors") and begin > 4096]
    assert [begin for begin in {*begins} if begins.count(begin) > 1] == failed != []


SCRIPT = """
import sys
from pathlib import Path
from test_checkpoint_files import checkpoints

def peak():  # of this program: getrusage also counts what forked it
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])

before = peak()
_, state = checkpoints(sys.argv[1])._read(0, print)
print(peak() - before, sum(tensor.nbytes for tensor in state.values()))
"""


def test_a_large_one_is_held_once(tmp_path: Path) -> None:
    made(tmp_path, 25_000_000)
    path = os.pathsep.join(map(str, [ROOT / "tests/unit", ROOT / "tests", ROOT]))
    environment = os.environ | {"PYTHONPATH": path}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    more, held = map(int, told.stdout.split())
    assert held == 100_000_000
    assert more < 1.5 * held
