"""The sections of a recipe: every key, its default, and what it means. `recipe.py` checks them
against each other. No torch.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    ValidationInfo,
    field_validator,
)

from fusegpt_ray.errors import UserError
from fusegpt_ray.recipe.specs import (
    METRIC_SPECS,
    PUBLISHED_LENGTH,
    PUBLISHED_SPECS,
    Counting,
    MetricSpec,
    PublishedSpec,
)
from fusegpt_ray.recipe.text_sections import Section, Text, TextPart, Texts, Uri
from fusegpt_ray.uris import refuse_secret

_Other = Literal["slicegpt", "sleb", "shortgpt", "angular", "foldgpt", "last", "random"]
Shallower = Literal["mi", "mi+linear", "mi+ft", "fusegpt", "streamline", _Other]
Method = Literal[Shallower, "tli", "dus"]
Preset = Literal["best", "rounds", "paper"]
Metric = Literal["mi", "kl", "loss", "bi"]
Candidate = Literal["mi", "kl", "loss", "bi", "run", "spaced"]
Bos = Literal["auto", "always", "never"]
Beta = Annotated[float, Field(ge=0, lt=1)]
Dtype = Literal["auto", "float32", "bfloat16"]
MOST = 10_000_000
"""The largest count that a recipe may ask for: a larger one is a slip."""
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]


def one_or_many(value: Any) -> Any:
    """A list may be left out around a single value."""
    return value if isinstance(value, list | tuple) else [value]


class Model(Section):
    """The dense model."""

    source: Uri
    """Local folder, Hugging Face hub id, or any fsspec URI (s3://…, gs://…) of a safetensors
    checkpoint."""
    revision: str | None = None
    """Hub only: branch, tag or commit."""
    dtype: Dtype = "auto"
    """Arithmetic of scoring and fine-tuning, never the output's dtype; `auto`: float32 on a CPU,
    bfloat16 on a GPU for a 16-bit checkpoint. float16 is not offered: gradients underflow in it."""


class Calibration(Texts):
    """Windows of text that scoring and fine-tuning see."""

    windows: int = Field(1024, ge=1, le=MOST)
    """How many windows fine-tuning uses; scoring uses the first `importance.windows` of them."""
    length: int = Field(2048, ge=2, le=MOST)
    """Tokens a window, the beginning-of-sequence token among them where there is one."""
    pack: bool = True
    """Whether rows are joined, so that a window may hold the end of one and the beginning of
    others. `false`: each row (of plain text: each file) is a window of its own, also in `heal` and
    `evaluation`: cut at `length` where it is longer, padded where it is shorter. Padding never
    counts. A row may then be a conversation, a list of messages, to which the model's chat
    template is applied."""
    images: bool = False
    """Whether rows are conversations with images, each a sample of its own, also in `heal` and
    `evaluation`: the model's own processor and chat template make it, and one that is longer than
    `length` is left out. `pack`, `bos` and `piece_mb` then play no part."""
    bos: Bos = "auto"
    """Whether each window begins with the tokenizer's beginning-of-sequence token, also in
    `evaluation`. `auto`: if the tokenizer itself puts it before a text; a model trained with it is
    another model without. The paper's numbers, and all of this project's before there was this key:
    `never`."""
    seed: Seed = 0
    """Where the windows start: random.Random(seed), as in the paper's code."""
    piece_mb: int = Field(16, ge=1, le=MOST)
    """Rows are joined and tokenised in pieces of at most this many megabytes; a tokenizer takes
    some 165 bytes for each."""


class Evaluation(Text):
    """Held-out text for the perplexities of the report."""

    data: Uri
    """As in `Text`; or a text that papers measure, read as they do: `wikitext2` or `c4` from the
    hub, `wikitext2=FILE` or `c4=FILE` from a copy of it. Such a text has only `length`, `windows`
    and `bos` beside it."""
    split: str = "test"
    """`datasets` only: the split."""
    length: int | None = Field(None, ge=2, le=MOST)
    """Tokens a window; left out: `calibration.length`, and of a published text 2048."""
    pack: bool | None = None
    """Left out: `calibration.pack`."""
    images: bool | None = None
    """Left out: `calibration.images`. The perplexity is that of the answers' tokens."""
    bos: Bos | None = None
    """Left out: `calibration.bos`; of a published text what the tokenizer puts before the whole
    text, once, as in the papers' code."""
    windows: int | None = Field(None, ge=1, le=MOST)
    """Only the first so many windows; left out: the whole text, and of `c4` 256."""

    @property
    def published(self) -> PublishedSpec | None:
        """What is read, if it is one of the texts that papers measure."""
        return PUBLISHED_SPECS.get(self.data.partition("=")[0])

    @property
    def most_windows(self) -> int | None:
        """No more than these; None: as many as the whole text has, which nobody has counted."""
        return self.windows or (self.published.windows if self.published else None)

    @property
    def copy_of_published(self) -> str:
        """Where the published text is to be read from; empty: the hub."""
        return self.data.partition("=")[2] if self.published else ""

    def length_or(self, other: int) -> int:
        """Tokens a window, of a text that says nothing and is not published the `other`."""
        return self.length or (PUBLISHED_LENGTH if self.published else other)

    @field_validator("data")
    @classmethod
    def _check_copy(cls, data: str) -> str:
        name, sign, copy = data.partition("=")
        if name in PUBLISHED_SPECS and sign:
            if not copy:
                raise UserError("", data, "names no copy", f"name a file after it, or say {name}")
            refuse_secret("", copy)
        return data

    @field_validator("config", "split", "revision", "column", "image_folder", "pack", "images")
    @classmethod
    def _check_as_published(cls, value: Any, info: ValidationInfo) -> Any:
        """What says no more than the default is taken: it stands in recipes written as JSON."""
        name, key = info.data.get("data", "").partition("=")[0], str(info.field_name)
        if name in PUBLISHED_SPECS and value != cls.model_fields[key].default:
            fix = f"leave {key} out, or name the text by its file or id alone"
            raise UserError("", value, f"stands beside {name}, which is read as papers do", fix)
        return value


class Importance(Section):
    """How the block to remove is chosen: the one with the lowest score."""

    metric: Metric = "mi"
    """The score, a mean over tokens. `mi`: Macro Influence, 1 − cosine of the last states with the
    block and without it. `kl`: KL divergence of the dense model's next tokens to those of the model
    without the block, in nats. `loss`: cross-entropy of the model without the block, in nats
    (SLEB). `bi`: Block Influence, 1 − cosine of the states that enter and leave the block, which
    costs a single walk of the model (ShortGPT)."""
    windows: int = Field(32, ge=1, le=MOST)
    """How many windows score the blocks: the first ones of the calibration."""
    batch: int = Field(4, ge=1, le=MOST)
    """Windows that pass a block in one call, and the steps in which scoring stops a block that
    cannot be the lowest: small saves work as long as batch × `calibration.length` tokens keep the
    device busy. Fixed by the recipe, never by the cluster: sums are the same on any. Bounds the
    memory of activations in scoring, evaluation and the states for fine-tuning."""
    tokens: Counting = "all"
    """Which tokens of samples with images count in the score: `all` of them, those of `text`, or
    those of an `image` alone. Padding never counts, and of `loss` only tokens of answers do."""
    all: bool = False
    """Score every block on all windows, though the choice is the same: for tables of all scores
    (`fusegpt score` always does)."""
    racing: float | None = Field(None, gt=0, lt=1)
    """Probability with which another block than that of the full table may be chosen, to give up
    most blocks after a few windows by paired tests (assumptions: `importance/racing.py`), such as
    0.05; left out: the choice is exact. `bi` has no use for it."""

    @property
    def spec(self) -> MetricSpec:
        """What is known of the metric."""
        return METRIC_SPECS[self.metric]


class Fusion(Section):
    """How the chosen block is fused into its neighbours, and how the group is fine-tuned
    (method.md).
    """

    start: Literal["auto", "none", "linear", "matrix", "scale"] = "auto"
    """How the block before the gap is repaired, in closed form, before the group is trained, or
    instead (method `mi+linear`, which takes `linear` if this is left out). `linear`: its last
    linear layer takes over what the removed block added, as a function of the layer's inputs.
    `matrix`: as one of its outputs (ReplaceMe). `scale`: its outputs times a number. `auto`:
    `linear`, or `none` where the model has no such layer or the windows too few tokens."""
    light: Literal["block", "mlp"] = "block"
    """What `streamline` puts in place of its run. `block`: a whole block. `mlp`: one whose
    attention gives nothing, so that its MLP alone learns. As a file, one is as large as the other.
    """
    group_size: int = Field(7, ge=1, le=MOST)
    """Neighbours that take the donor in; with the donor, one block more."""
    rank: int = Field(128, ge=1, le=MOST)
    """Rank r of the fusion coefficients C·D."""
    lora_rank: int = Field(128, ge=1, le=MOST)
    """Rank of the low-rank update B·A on the neighbours' own weights."""
    epochs: int = Field(1, ge=1, le=MOST)
    """Passes over the calibration windows for each removed block."""
    batch: int = Field(8, ge=2, le=MOST)
    """Windows a loss batch (a dimension of the loss, whatever the number of workers)."""
    loss: Literal["batch_kl", "normalized_mse"] = "normalized_mse"
    """`batch_kl`: the paper's KL of softmaxes over the batch. `normalized_mse`: squared error
    between RMS-normalised states."""
    teacher: Literal["current", "dense"] = "dense"
    """`current`: the group as it was before this round (paper). `dense`: the dense model at the
    same depth; errors do not pile up."""
    learning_rate: float = Field(3e-4, gt=0, allow_inf_nan=False)
    """Adam's rate for the fusion coefficients C, D and c, or for `streamline`'s light block."""
    lora_learning_rate: float = Field(2e-4, gt=0, allow_inf_nan=False)
    """Adam's rate for everything else that learns: LoRA and norm weights."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Adam's betas."""
    eps: float = Field(1e-8, gt=0, allow_inf_nan=False)
    """Adam's epsilon."""
    trained_dtype: Literal["float32", "model"] = "float32"
    """`float32`: masters and optimizer state in float32. `model`: in the arithmetic's dtype, bf16
    on GPUs (paper)."""
    fold: Literal["at_end", "each_round"] = "each_round"
    """`at_end`: a neighbour keeps training the terms of earlier rounds (paper). `each_round`: they
    are folded; less memory."""


class Heal(Texts):
    """Healing: after the last round all blocks are trained together."""

    data: Uri | tuple[TextPart, ...] | None = None  # type: ignore[assignment]
    """Texts as in `calibration`; left out: the calibration's."""
    tokens: int | None = Field(None, ge=1, le=1_000 * MOST)
    """How many tokens of text each published model is trained on, each token once; left out: as
    many as the calibration has, or fewer where the text has no more."""
    repeat: bool = False
    """Whether a text with fewer than `tokens` is passed several times, instead of refused."""
    train: Literal["lora", "all", "new"] = "lora"
    """What learns in the blocks. `lora`: low-rank updates of all linear layers, and the norms.
    `all`: every weight, for four times as many bytes in float32. `new`: every weight of the blocks
    that `tli` or `dus` has put in, and nothing else (LLaMA Pro, arXiv 2401.02415)."""
    share: int | None = Field(None, ge=2, le=MOST)
    """So many adjacent blocks form a group that shares one set of matrices, the first one's at
    first, as FoldGPT does; norms stay each block's own. The files are no smaller."""
    share_by: Literal["place", "similarity"] = "place"
    """How groups are cut. `place`: all of one size. `similarity`: as many groups, of any sizes, so
    that the blocks that take over others' matrices are those that change states least."""
    rank: int = Field(64, ge=1, le=MOST)
    """Rank of the low-rank updates, which only `train: lora` has."""
    learning_rate: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Adam's highest rate; left out: 2e-4 for `lora` and `new`, 2e-5 for `all`."""
    warmup: float = Field(0.05, ge=0, lt=1)
    """Share of the steps in which the learning rate grows; then it falls to 0 on a cosine."""
    batch: int = Field(8, ge=1, le=MOST)
    """Windows a step, whatever the number of workers."""
    loss: Literal["kl", "tokens"] = "kl"
    """`kl`: KL divergence to the dense model's next-token distributions. `tokens`: cross-entropy of
    the text's next tokens, for which no dense model is run; methods that make models deeper take it
    if this is left out."""
    hidden: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Weight of a second term beside `kl`: the squared error between the RMS-normalised last hidden
    states of both models."""
    held_out: int = Field(16, ge=1, le=MOST)
    """Windows by which the best state is chosen; a multiple of `batch`. Healing never trains on
    them, and the rounds before have not seen their text either, if it is no conversation with
    images and the text is long enough."""
    looks: int = Field(8, ge=1, le=MOST)
    """How often, evenly over the training, the held-out windows are evaluated."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Adam's betas."""
    eps: float = Field(1e-8, gt=0, allow_inf_nan=False)
    """Adam's epsilon."""

    @property
    def rate(self) -> float:
        """The learning rate, given or by default."""
        return self.learning_rate or {"all": 2e-5}.get(self.train, 2e-4)


class Search(Section):
    """A tournament before the rounds: several sets of blocks are dropped, each model that is left
    is healed for a while, and the rounds remove the blocks of the best. Which set does least harm
    is not which heals best.
    """

    candidates: tuple[Candidate, ...] = ("mi", "kl", "loss", "bi", "run", "spaced")
    """How the sets are found. `mi`, `kl`, `loss`, `bi`: one block after another by that metric.
    `run`: the consecutive blocks that change states least. `spaced`: by `importance.metric`, no two
    blocks side by side."""
    tokens: int | None = Field(None, ge=1, le=1_000 * MOST)
    """How many tokens each is healed on, as `heal` says; left out: an eighth of the healing's."""
