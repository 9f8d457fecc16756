"""Blocks under torch.compile: one block is compiled, not the model, so that all blocks, rounds and
walks share what was compiled for the first."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from fusegpt_ray.model.device import deterministic_or_not
from fusegpt_ray.model.memory import is_out_of_memory
from fusegpt_ray.model.recorder import Context, run_block

RunBlock = Callable[[nn.Module, torch.Tensor, Context], torch.Tensor]
"""Block, states [B, T, D], context → states [B, T, D]."""

_LOG = logging.getLogger(__name__)
VARIANTS = 64
"""How often the block may be compiled: once for each kind of block, number of windows and use (with
gradients or without). Beyond that torch runs it as it is."""

MOST_CLEARED = 16
"""How often a process goes on after a file that a killed compiler has left."""


def compiles(wanted: Literal["auto"] | bool, device: torch.device) -> bool:
    """Whether blocks are compiled on this device, for the recipe's `cluster.compile`."""
    return device.type == "cuda" if wanted == "auto" else wanted


@cache
def block_function(compiled: bool) -> RunBlock:
    """How blocks are run in this process."""
    return CompiledBlock() if compiled else run_block


class CompiledBlock:
    """`run_block`, compiled when it is first called. Where it cannot be compiled it is run as it is
    from then on, which is said once.
    """

    def __init__(self, backend: Any = "inductor") -> None:
        limit = torch._dynamo.config.recompile_limit
        torch._dynamo.config.recompile_limit = max(limit, VARIANTS)
        self.gave_up = ""
        """Why blocks are run as they are, if that is so."""
        self._cleared = 0
        self._run: RunBlock = torch.compile(run_block, dynamic=False, backend=backend)

    def __call__(self, block: nn.Module, h_BTD: torch.Tensor, context: Context) -> torch.Tensor:
        try:
            return self._run(block, h_BTD, context)
        except torch._dynamo.exc.TorchDynamoException as error:
            if is_out_of_memory(error):
                raise
            if not self.cleared(error):
                self.give_up(error)
            return self(block, h_BTD, context)

    def cleared(self, error: Exception) -> bool:
        """Whether an error in compiling is only that of a file that a killed compiler has left. It
        is removed, so that the next attempt makes it anew. Compiled code is kept on the machine,
        and with such a file no process there would ever compile the same block.
        """
        file = _module_without_content(error)
        if file is None or self._cleared >= MOST_CLEARED:
            return False
        file.unlink(missing_ok=True)
        self._cleared += 1
        _LOG.warning("%s was empty, left by a compiler that was killed: it is made anew", file)
        return True

    def give_up(self, error: Exception) -> None:
        """Run blocks as they are from now on, because of an error in compiling one."""
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
        self.gave_up = f"blocks are not compiled: {reason}"
        _LOG.warning("%s", self.gave_up)
        self._run = run_block


def rehearse(run: RunBlock, passes: Callable[[], object]) -> None:
    """A pass there and back through blocks that `run` runs, before any that counts. The way back is
    compiled when it is first gone, outside of the call of a block: where that fails, blocks are run
    as they are from now on. `passes` must be safe to repeat.
    """
    while True:
        try:
            deterministic_or_not(passes)
        except Exception as error:
            if not isinstance(run, CompiledBlock) or run.gave_up or is_out_of_memory(error):
                raise
            if not run.cleared(error):
                run.give_up(error)
        else:
            return


def _module_without_content(error: BaseException) -> Path | None:
    """The file of a module that could not be loaded because there is nothing in it, or because
    another process has just removed it.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ImportError) and cause.path:
            file = Path(cause.path)
            return None if file.exists() and file.stat().st_size else file
        cause = cause.__cause__ or cause.__context__
    return None
