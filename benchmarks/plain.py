"""The paper's method (arXiv 2411.14507, and what its public code does), the plain way, for LLaMA:
transformers' own blocks, plain operators, all in memory, nothing of the package. What benchmarks
compare with.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

GROUP, RANK = 7, 128
BETAS, EPS, FUSING_RATE, OTHER_RATE = (0.9, 0.95), 1e-8, 1e-3, 9.65e-6
SCORE_WINDOWS, SCORE_BATCH, BATCH = 32, 4, 8


class PlainFused(nn.Module):
    """W + B·A + Σ (C·D) ⊙ W_p, the plain way: one term a donor."""

    def __init__(self, own: nn.Linear, rank: int) -> None:
        super().__init__()
        assert own.bias is None, "written for LLaMA, whose layers have no biases"
        self.own: nn.Linear = own.requires_grad_(False)
        self.rank: int = rank
        A, B = self._pair()
        self.A: nn.Parameter = A
        self.B: nn.Parameter = B
        self.donors: nn.ModuleList = nn.ModuleList()
        self.C: nn.ParameterList = nn.ParameterList()
        self.D: nn.ParameterList = nn.ParameterList()

    def _pair(self) -> tuple[nn.Parameter, nn.Parameter]:
        """[rank, in] Kaiming uniform, [out, rank] zeros."""
        inner = nn.Parameter(torch.empty(self.rank, self.own.in_features))
        nn.init.kaiming_uniform_(inner, a=math.sqrt(5))
        return inner, nn.Parameter(torch.zeros(self.own.out_features, self.rank))

    def fuse(self, donor: nn.Linear) -> PlainFused:
        inner, outer = self._pair()
        self.donors.append(donor.requires_grad_(False))
        self.D.append(inner)
        self.C.append(outer)
        return self

    def weight(self) -> torch.Tensor:
        weight = self.own.weight + self.B @ self.A
        for C, D, donor in zip(self.C, self.D, self.donors, strict=True):
            weight = weight + (C @ D) * donor.weight
        return weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight())

    @torch.no_grad()
    def folded(self) -> nn.Linear:
        """One plain layer."""
        plain = nn.Linear(self.own.in_features, self.own.out_features, bias=False)
        plain.weight.copy_(self.weight())
        return plain


def plain_group(
    neighbours: Iterable[nn.Module], donor: nn.Module, starts: Iterable[nn.Module], rank: int
) -> nn.ModuleList:
    """Copies of the neighbours, each linear layer fused with the donor's. Coefficients are those of
    `starts`, by layer: A, B, C0 and D0.
    """
    blocks = nn.ModuleList()
    for neighbour, start in zip(neighbours, starts, strict=True):
        block = copy.deepcopy(neighbour)
        for name, layer in list(block.named_modules()):
            if isinstance(layer, nn.Linear):
                own = donor.get_submodule(name)
                assert isinstance(own, nn.Linear)
                fused = PlainFused(layer, rank).fuse(own)
                learned = start.get_submodule(name)
                coefficients = {"A": fused.A, "B": fused.B, "C0": fused.C[0], "D0": fused.D[0]}
                for key, value in coefficients.items():
                    value.data.copy_(learned.get_parameter(key).data)
                block.set_submodule(name, fused)
        blocks.append(block)
    return blocks


def blocks_forward(base: Any, blocks: Iterable[nn.Module], h_BTD: torch.Tensor) -> torch.Tensor:
    """States after these blocks of a LLaMA (`base`: with its rotary embedding)."""
    places_BT = torch.arange(h_BTD.shape[1], device=h_BTD.device).expand(h_BTD.shape[:2])
    rotary = base.rotary_emb(h_BTD, places_BT)
    for block in blocks:
        h_BTD = block(h_BTD, position_embeddings=rotary)
    return h_BTD


def knowledge_loss(student_BTD: torch.Tensor, teacher_BTD: torch.Tensor) -> torch.Tensor:
    """The paper's: KL over the batch, `batchmean`, as its public code divides."""
    return nn.functional.kl_div(
        student_BTD.log_softmax(0), teacher_BTD.softmax(0), reduction="batchmean"
    )


def adam(student: nn.Module, steps: int) -> tuple[torch.optim.Optimizer, Any]:
    """Adam and its cosine to zero; the fusion's coefficients and the rest learn at different
    rates.
    """
    named = [
        ({"C", "D"} & set(name.split(".")), value)
        for name, value in student.named_parameters()
        if value.requires_grad
    ]
    fusing, others = (
        [value for of_fusion, value in named if bool(of_fusion) == wanted]
        for wanted in (True, False)
    )
    rates = [{"params": fusing, "lr": FUSING_RATE}, {"params": others, "lr": OTHER_RATE}]
    optimizer = torch.optim.Adam(rates, betas=BETAS, eps=EPS)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)


class Compression:
    """A whole run in memory: brute-force scoring, fusion, fine-tuning, until enough blocks are
    gone.
    """

    def __init__(self, model: Any, windows_WT: torch.Tensor, epochs: int, rank: int = RANK) -> None:
        self.base, self.windows_WT, self.epochs, self.rank = (
            model.model.requires_grad_(False),
            windows_WT,
            epochs,
            rank,
        )
        self.linears = [
            name
            for name, layer in self.base.layers[0].named_modules()
            if isinstance(layer, nn.Linear)
        ]
        self.seconds = {"score": 0.0, "states": 0.0, "finetune": 0.0}

    @torch.no_grad()
    def fold(self) -> None:
        """Every fused layer into a plain one: the model is an ordinary one again."""
        for block in self.base.layers:
            for name in self.linears:
                if isinstance(layer := block.get_submodule(name), PlainFused):
                    block.set_submodule(name, layer.folded())
        self.base.config.num_hidden_layers = len(self.base.layers)

    def run(self, remove: int) -> list[int]:
        """The dense model's blocks that went, in order."""
        numbers, gone = list(range(len(self.base.layers))), []
        for _ in range(remove):
            with self._timed("score"):
                place = self.least_missed()
            self.round(place)
            gone.append(numbers.pop(place))
        return gone

    @torch.no_grad()
    def least_missed(self) -> int:
        """Macro Influence by a full forward pass for every block."""
        blocks, sums = self.base.layers, torch.zeros(len(self.base.layers), dtype=torch.float64)
        for ids_BT in self.windows_WT[:SCORE_WINDOWS].split(SCORE_BATCH):
            full_BTD = blocks_forward(self.base, blocks, self.base.embed_tokens(ids_BT))
            for place in range(len(blocks)):
                rest = [block for number, block in enumerate(blocks) if number != place]
                without_BTD = blocks_forward(self.base, rest, self.base.embed_tokens(ids_BT))
                sums[place] += (
                    1
                    - nn.functional.cosine_similarity(full_BTD, without_BTD, dim=-1).double().mean()
                )
        return int(sums.argmin())

    def round(self, place: int) -> None:
        blocks = self.base.layers
        size = min(GROUP + 1, len(blocks))
        begin = max(0, min(place - size // 2, len(blocks) - size))
        group = list(blocks[begin : begin + size])
        with self._timed("states"):
            entering_WTD, leaving_WTD = self.states(begin, group)
        with self._timed("finetune"):
            donor = group.pop(place - begin)
            student = self.student(group, donor)
            self.finetune(student, entering_WTD, leaving_WTD)
        self.base.layers = nn.ModuleList(
            [*blocks[:begin], *student.requires_grad_(False), *blocks[begin + size :]]
        )

    @torch.no_grad()
    def states(self, begin: int, group: Sequence[nn.Module]) -> tuple[torch.Tensor, torch.Tensor]:
        """Entering the group and leaving its teacher, the current model's own group."""
        batches = self.windows_WT.split(BATCH)
        entering = [
            blocks_forward(self.base, self.base.layers[:begin], self.base.embed_tokens(ids_BT))
            for ids_BT in batches
        ]
        return torch.cat(entering), torch.cat(
            [blocks_forward(self.base, group, h_BTD) for h_BTD in entering]
        )

    def student(self, neighbours: Sequence[nn.Module], donor: nn.Module) -> nn.ModuleList:
        """Every linear layer fused with the donor's; terms of earlier rounds go on learning,
        with the norms.
        """
        for name in self.linears:
            layer: Any = donor.get_submodule(name)
            plain = layer.folded() if isinstance(layer, PlainFused) else layer
            for block in neighbours:
                own: Any = block.get_submodule(name)
                block.set_submodule(
                    name,
                    (own if isinstance(own, PlainFused) else PlainFused(own, self.rank)).fuse(
                        plain
                    ),
                )
        student = nn.ModuleList(neighbours)
        for name, value in student.named_parameters():
            value.requires_grad_(not {"own", "donors"} & set(name.split(".")))
        return student

    def finetune(
        self, student: nn.ModuleList, entering_WTD: torch.Tensor, leaving_WTD: torch.Tensor
    ) -> None:
        batches = list(zip(entering_WTD.split(BATCH), leaving_WTD.split(BATCH), strict=True))
        optimizer, schedule = adam(student, self.epochs * len(batches))
        for _ in range(self.epochs):
            for entering_BTD, leaving_BTD in batches:
                optimizer.zero_grad()
                knowledge_loss(
                    blocks_forward(self.base, student, entering_BTD), leaving_BTD
                ).backward()
                optimizer.step()
                schedule.step()

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - began
