"""Make the example of this folder: a small trained LLaMA and the text around it.

Text.  Every Python installation carries its own prose: the language reference in
``pydoc_data.topics`` and the docstrings and comments of the standard library's modules (its tests
included, where installed).  One topic or one source file is one document; a document is its prose
paragraphs, one a line, without doctest sessions, tables and code. A paragraph seen before, in any
document, is dropped, so no text occurs twice.  The text is copyright of the Python Software
Foundation and comes under the PSF License Version 2 (PSF-2.0).

Split.  By whole documents, on the CRC-32 of the document's name: of 100 residues the first
``HELD_OUT`` are held-out text, the next ``CALIBRATION`` calibration text, and the rest is what the
model is trained on (and is not stored).

Model.  ``LlamaForCausalLM`` from scratch: 12 blocks of width 192, grouped-query attention with 6
query and 2 key-value heads, tied embeddings, a byte-level BPE vocabulary of 2048, trained on
windows of 256 tokens.

The files here were made by the defaults with Python 3.11.7 and torch 2.13.0 in 33 minutes on one
CPU core: 952 160 training tokens, 3000 steps, held-out perplexity 34.78 (training 25.0; more steps
only learn the text by heart).
"""

import argparse
import ast
import math
import platform
import re
import sysconfig
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

HELD_OUT, CALIBRATION = 4, 16
VOCABULARY, WINDOW, BATCH = 2048, 256, 8
LEARNING_RATE, WARM_UP, WEIGHT_DECAY, SEED = 2e-3, 200, 1.0, 0
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__"}
COMMENT_BLOCK = re.compile(r"(?:^[ \t]*#.*\n)+", re.MULTILINE)


def prose(text: str) -> Iterator[str]:
    """The paragraphs of ``text`` that read as prose, each on one line."""
    for block in re.split(r"\n\s*\n", text):
        paragraph = " ".join(block.split())
        letters = sum(c.isalpha() or c == " " for c in paragraph)
        if (
            len(paragraph.split()) >= 6
            and letters >= 0.85 * len(paragraph)
            and ">>>" not in paragraph
        ):
            yield paragraph


def source_text(source: str) -> Iterator[str]:
    """The docstrings of a module, in the order of the source, and then its blocks of comment
    lines.
    """
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, documented)]
    for node in sorted(nodes, key=lambda node: getattr(node, "lineno", 0)):
        yield ast.get_docstring(node) or ""
    for block in COMMENT_BLOCK.findall(source):
        yield re.sub(r"^[ \t]*#+[!:]?", "", block, flags=re.MULTILINE)


def documents() -> Iterator[tuple[str, list[str]]]:
    """Name and new paragraphs of every document: the topics first, then the source files, both
    sorted by name.
    """

    def raw() -> Iterator[tuple[str, list[str]]]:
        for topic in sorted(topics):
            yield f"topic:{topic}", [topics[topic]]
        library = Path(sysconfig.get_path("stdlib"))
        for path in sorted(library.rglob("*.py")):
            name = path.relative_to(library)
            if SKIPPED_FOLDERS.isdisjoint(name.parts):
                try:
                    yield name.as_posix(), list(source_text(path.read_text(encoding="utf-8")))
                except (SyntaxError, ValueError):  # test data that is broken on purpose
                    continue

    seen: set[str] = set()
    for name, texts in raw():
        fresh = []
        for paragraph in (paragraph for text in texts for paragraph in prose(text)):
            key = re.sub(r"\W+", "", paragraph).lower()
            if key not in seen:
                seen.add(key)
                fresh.append(paragraph)
        if fresh:
            yield name, fresh


def split_text() -> dict[str, str]:
    """The three texts: paragraphs a line each, documents separated by a blank line."""
    parts: dict[str, list[str]] = {"heldout": [], "calibration": [], "train": []}
    for name, paragraphs in documents():
        residue = zlib.crc32(name.encode()) % 100
        part = (
            "heldout"
            if residue < HELD_OUT
            else "calibration"
            if residue < HELD_OUT + CALIBRATION
            else "train"
        )
        parts[part].append("\n".join(paragraphs) + "\n")
    return {part: "\n".join(texts) for part, texts in parts.items()}


def make_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on ``text``; it adds no special token by itself."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    bpe.train_from_iterator(text.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        model_max_length=512,
    )


def make_model() -> LlamaForCausalLM:
    """The untrained model, its residual projections scaled down by the depth."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=416,
        num_hidden_layers=12,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.div_(math.sqrt(2 * config.num_hidden_layers))
    return model


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> torch.Tensor:
    """All tokens of ``text`` in a row, without special tokens."""
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, tokens: torch.Tensor) -> float:
    """Exp of the mean loss over consecutive windows of ``tokens``; the tail is dropped."""
    model.eval()
    windows = tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)
    losses = [
        model(input_ids=window[None], labels=window[None], use_cache=False).loss
        for window in windows
    ]
    return math.exp(torch.stack(losses).double().mean().item())


def batches(tokens: torch.Tensor) -> Iterator[torch.Tensor]:
    """Endless batches: in every pass all windows in a new order, cut from a new offset."""
    while True:
        offset = int(torch.randint(WINDOW, ()))
        count = (len(tokens) - offset) // WINDOW
        windows = tokens[offset : offset + count * WINDOW].view(count, WINDOW)
        yield from windows[torch.randperm(count)].split(BATCH)


def train(
    model: LlamaForCausalLM, tokens: torch.Tensor, held_out: torch.Tensor, steps: int
) -> None:
    """AdamW with warm-up and cosine decay, the matrix products in bfloat16."""

    def factor(step: int) -> float:
        return min((step + 1) / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * step / steps))

    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    scales = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": scales, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    start = time.perf_counter()
    losses: list[float] = []
    for step, batch in zip(range(1, steps + 1), batches(tokens), strict=False):
        model.train()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if step % 500 == 0 or step == steps:
            seen, unseen = math.exp(sum(losses) / len(losses)), perplexity(model, held_out)
            elapsed = time.perf_counter() - start
            print(
                f"step {step}  {elapsed:.0f} s  train {seen:.2f}  held-out {unseen:.2f}", flush=True
            )
            losses.clear()


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Make the example model and its calibration and held-out text."
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent, help="folder for tiny-llama/ and text/"
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=3000,
        help=f"training steps of {BATCH} windows of {WINDOW} tokens",
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of the training")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(SEED)

    texts = split_text()
    (arguments.out / "text").mkdir(parents=True, exist_ok=True)
    for part in ("calibration", "heldout"):
        (arguments.out / "text" / f"{part}.txt").write_text(texts[part], encoding="utf-8")
    tokenizer = make_tokenizer(texts["train"])
    folder = arguments.out / "tiny-llama"
    tokenizer.save_pretrained(folder)
    tokens = {part: encode(tokenizer, text) for part, text in texts.items()}
    print(f"Python {platform.python_version()}, torch {torch.__version__}")
    for part, text in texts.items():
        print(f"{part}: {len(text.encode())} bytes, {len(tokens[part])} tokens")

    model = make_model()
    train(model, tokens["train"], tokens["heldout"], arguments.steps)
    model.bfloat16().save_pretrained(folder)

    saved = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    value = perplexity(saved, encode(AutoTokenizer.from_pretrained(folder), texts["heldout"]))
    print(f"held-out perplexity of the saved model: {value:.3f}")


if __name__ == "__main__":
    main()
