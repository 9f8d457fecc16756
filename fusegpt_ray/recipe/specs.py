"""What is known of methods, metrics, presets and published texts without their code: names, words
for people, and what each asks of a recipe. No torch.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

Counting = Literal["all", "text", "image"]
"""Which tokens count in a score."""


Choice = Literal["each_round", "once", "run", "gates", "unseen", "none"]
"""How blocks are chosen: scored before each round; scored once, in the dense model; as one run of
so many consecutive blocks; by gates that learn; without looking at the model; or not at all, as
none goes."""
Inserts = Literal["", "at_intervals", "a_run"]
"""How copies of blocks are put into a model to make it deeper: not at all; one by one, at equal
distances; or as one run."""


class MethodSpec(NamedTuple):
    """What is known of a method without its code, which is in `methods/`."""

    about: str
    """For the model card; `{blocks}` stands for which blocks go."""
    stage: str
    """What a model is called after the rounds (`text.protocol.STAGES`)."""
    trains: bool
    """Whether something is trained, so that the calibration windows must fill loss batches."""
    fuses: bool
    """Whether its neighbours learn terms of the removed block's weights."""
    light: bool = False
    """Whether all that it trains is one block, after the last round."""
    repairs: bool = False
    """Whether it is nothing without a repair in closed form (`fusion.start`)."""
    metric: str | None = None
    """The importance metric that belongs to it; None: any."""
    choice: Choice = "each_round"
    chosen_by: str = ""
    """What is lowest of the block that goes, for people, where it is no importance metric."""
    inserts: Inserts = ""
    stays_itself: bool = False
    """Whether the deeper model computes at first just what the model did."""

    @property
    def trains_groups(self) -> bool:
        """Whether the blocks around each removed one are trained."""
        return self.trains and not self.light

    @property
    def does(self) -> str:
        """All that it does where it neither trains groups nor repairs, for messages."""
        if self.choice == "none":
            return "insert blocks" if self.inserts else "make a model narrower"
        return "train one block" if self.light else "drop blocks"

    @property
    def by_metric(self) -> bool:
        """Whether an importance metric chooses the blocks."""
        return self.choice in ("each_round", "once")

    @property
    def nested(self) -> bool:
        """Whether a model of a lower sparsity is on the way to that of a higher one."""
        return self.choice not in ("run", "gates", "none")

    @property
    def narrows(self) -> bool:
        """Whether it makes a model narrower, not shallower."""
        return self.choice == "none" and not self.inserts


METHOD_SPECS: dict[str, MethodSpec] = {
    "mi": MethodSpec(
        "{blocks} dropped, nothing trained",
        stage="dropped",
        trains=False,
        fuses=False,
    ),
    "mi+linear": MethodSpec(
        "{blocks} dropped, the block before each changed by a least-squares fit, nothing trained",
        stage="repaired",
        trains=False,
        fuses=False,
        repairs=True,
    ),
    "mi+ft": MethodSpec(
        "{blocks} dropped, their neighbours fine-tuned",
        stage="trained",
        trains=True,
        fuses=False,
    ),
    "fusegpt": MethodSpec(
        "{blocks} fused into their neighbours (FuseGPT)",
        stage="fused",
        trains=True,
        fuses=True,
    ),
    "streamline": MethodSpec(
        "a run of consecutive blocks replaced by one block, trained to its output (LLM-Streamline)",
        stage="replaced",
        trains=True,
        fuses=False,
        light=True,
        choice="run",
        chosen_by="1 − cosine across its run",
    ),
    "sleb": MethodSpec(
        "{blocks} dropped, nothing trained",
        stage="dropped",
        trains=False,
        fuses=False,
        metric="loss",
    ),
    "shortgpt": MethodSpec(
        "{blocks}, all scored once in the dense model, dropped, nothing trained",
        stage="dropped",
        trains=False,
        fuses=False,
        metric="bi",
        choice="once",
    ),
    "angular": MethodSpec(
        "the consecutive blocks across which states turn least dropped, nothing trained",
        stage="dropped",
        trains=False,
        fuses=False,
        choice="run",
        chosen_by="angular distance across its run",
    ),
    "foldgpt": MethodSpec(
        "the blocks of the lowest trained gates dropped, nothing trained but these",
        stage="dropped",
        trains=False,
        fuses=False,
        choice="gates",
        chosen_by="trained gate",
    ),
    "last": MethodSpec(
        "the last blocks but the final one dropped, nothing trained",
        stage="dropped",
        trains=False,
        fuses=False,
        choice="unseen",
        chosen_by="distance from the end",
    ),
    "random": MethodSpec(
        "blocks drawn at random dropped, nothing trained",
        stage="dropped",
        trains=False,
        fuses=False,
        choice="unseen",
        chosen_by="drawn number",
    ),
    "slicegpt": MethodSpec(
        "its norms folded, its residual stream rotated to the principal axes of its states, and the"
        " last of these sliced off, nothing trained (SliceGPT, with one rotation for all blocks)",
        stage="sliced",
        trains=False,
        fuses=False,
        choice="none",
        chosen_by="variance along an axis",
    ),
    "tli": MethodSpec(
        "copies of blocks that begin as nothing, their output layers zero, nothing trained (TLI)",
        stage="inserted",
        trains=False,
        fuses=False,
        choice="none",
        inserts="at_intervals",
        stays_itself=True,
    ),
    "dus": MethodSpec(
        "the first and the last of its blocks, those between twice, nothing trained (SOLAR)",
        stage="inserted",
        trains=False,
        fuses=False,
        choice="none",
        inserts="a_run",
    ),
}


class MetricSpec(NamedTuple):
    """What is known of an importance metric without its code (`importance/metrics.py`)."""

    name: str
    """In the results of `fusegpt score`."""
    title: str
    """For people: a block is chosen for having the lowest of it."""
    against: Literal["current", "dense", "tokens"] = "current"
    """What the model without a block is compared with: the states of the model with it, those of
    the dense model, or the tokens that follow."""
    walks_on: bool = True
    """Whether the model without a block is walked to its end; else it is compared at that block."""
    skipped: int = 0
    """Tokens of a window that have no number."""

    @property
    def predicts(self) -> bool:
        """Whether only tokens that are to be predicted count."""
        return self.against == "tokens"


METRIC_SPECS: dict[str, MetricSpec] = {
    "mi": MetricSpec("macro_influence", "Macro Influence"),
    "kl": MetricSpec("kl", "KL divergence from the dense model", "dense"),
    "loss": MetricSpec("loss", "loss when left out (SLEB)", "tokens", skipped=1),
    "bi": MetricSpec("block_influence", "Block Influence (ShortGPT)", walks_on=False),
}

_GROUPS: dict[str, Any] = {
    "start": "none",
    "loss": "normalized_mse",
    "teacher": "dense",
    "learning_rate": 1e-3,
    "lora_learning_rate": 3e-4,
    "trained_dtype": "float32",
    "fold": "each_round",
}
"""Where the paper's recipe loses quality (benchmarks/quality.py measures each): a teacher that
degrades with the model, a loss blind to shifts common to the batch, a LoRA rate that moves nothing,
bf16 masters. Its terms pile up as well: each round's step would take longer, and more memory, than
the last one's."""

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    # method.md, the paper's public code, row by row.
    "paper": {
        "fusion": {
            "loss": "batch_kl",
            "teacher": "current",
            "learning_rate": 1e-3,
            "lora_learning_rate": 9.65e-6,
            "trained_dtype": "model",
            "fold": "at_end",
            "start": "none",
            "epochs": 20,
        }
    },
    "rounds": {"fusion": {**_GROUPS, "epochs": 20}},
    # Most of the work goes where it is worth most (docs/quality.md): into healing.
    "best": {
        "fusion": {
            **_GROUPS,
            "start": "auto",
            "epochs": 1,
            "learning_rate": 3e-4,
            "lora_learning_rate": 2e-4,
        },
        "heal": {},
    },
}
"""By name, what each fills in: keys of `fusion` that the recipe leaves out; where the
method fuses, other sections, too."""


class PublishedSpec(NamedTuple):
    """A text that papers measure perplexity on, and how they read it: GPTQ's code, which SparseGPT,
    SliceGPT, ShortGPT and others took over. `text/published.py` reads it.
    """

    title: str
    repository: str
    """On the hub, of datasets."""
    revision: str
    """A commit: what a name stands for does not change."""
    file: str
    rows: int
    """How many of the first rows are joined."""
    whole: bool
    """Whether these are all the rows there are."""
    joint: str
    """Stands between two rows."""
    lines: bool = False
    """Whether the lines of a file of plain text are its rows, as they are in the original."""
    windows: int | None = None
    """The first so many are measured; None: all that are complete."""


PUBLISHED_LENGTH = 2048
"""Tokens a window."""
PUBLISHED_SPECS: dict[str, PublishedSpec] = {
    "wikitext2": PublishedSpec(
        "the test split of WikiText-2, raw",
        "Salesforce/wikitext",
        "b08601e04326c79dfdd32d625aee71d232d685c3",
        "wikitext-2-raw-v1/test-00000-of-00001.parquet",
        rows=4358,
        whole=True,
        joint="\n\n",
        lines=True,
    ),
    "c4": PublishedSpec(
        "the first 1100 documents of C4's validation split",
        "allenai/c4",
        "1588ec454efa1a09f29cd18ddd04fe05fc8653a2",
        "en/c4-validation.00000-of-00008.json.gz",
        rows=1100,
        whole=False,
        joint=" ",
        windows=256,
    ),
}
"""By the name that `data` takes, alone or before a copy's place: `wikitext2`, `wikitext2=FILE`."""

SAMPLE_PROMPTS = ("Once upon a time, there was", "The capital of France is", "def fibonacci(n):")
"""What the dense and the published model continue, if the recipe names nothing else."""
