"""The bounded part of the fuzzing, the same examples each time (`make chaos` throws many more)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fuzz import READERS, Reader, fuzz

EXAMPLES = 300


@pytest.mark.parametrize("reader", READERS, ids=[reader.name for reader in READERS])
def test_malformed_input_gets_the_one_error(reader: Reader) -> None:
    outcome = fuzz(reader, EXAMPLES)
    assert outcome.accepted and outcome.refused, "it reaches both answers"
    assert outcome.examples >= EXAMPLES * 0.9
