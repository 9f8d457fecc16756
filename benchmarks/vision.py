"""What images bring: a tiny LLaVA or Qwen2-VL learns to answer questions about pictures, loses some
of its blocks, and is calibrated on conversations with their pictures or on the same conversations
without.

    python benchmarks/vision.py [--model llava|qwen2_vl] [--steps 600] [--windows 256]
                                [--sparsity 0.25 0.5] [--seeds 1]

Everything is made here: pictures (`vision_task.py`), tokenizer, processor, and the model, which is
trained until it answers 19 of 20 questions. The perplexities are those of the answers' tokens on
pictures that were not seen before, as each run's manifest has them; *right* is the share of
questions that plain transformers answers with the published checkpoint, every token of the answer
being the likeliest.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch.nn.functional import cross_entropy
from vision_task import (
    EOS,
    PATCH,
    PLACE,
    SIDE,
    VOCABULARY,
    llava_processor,
    messages,
    qwen2_vl_processor,
    samples,
    write,
)

from fusegpt_ray import Recipe, compress
from fusegpt_ray.terminal.display import Display

BLOCKS, LENGTH, BATCH, ENOUGH = 12, 48, 32, 0.95
RUNS = {
    "dropped, chosen on text": ("mi", False),
    "dropped, chosen on images": ("mi", True),
    "fused and healed on text": ("fusegpt", False),
    "fused and healed on images": ("fusegpt", True),
}


TEXT: dict[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": VOCABULARY.index("<s>"),
    "eos_token_id": VOCABULARY.index(EOS),
    "pad_token_id": VOCABULARY.index(EOS),
}
IMAGE = VOCABULARY.index(PLACE)


def llava() -> tf.LlavaForConditionalGeneration:
    vision = tf.CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
    )
    config = tf.LlavaConfig(
        vision_config=vision, text_config=tf.LlamaConfig(**TEXT), image_token_id=IMAGE
    )
    return tf.LlavaForConditionalGeneration(config)


def qwen2_vl() -> tf.Qwen2VLForConditionalGeneration:
    vision = {
        "depth": 3,
        "embed_dim": 64,
        "num_heads": 4,
        "hidden_size": 64,
        "mlp_ratio": 2,
        "patch_size": PATCH // 2,
        "spatial_merge_size": 2,
        "temporal_patch_size": 1,
    }
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    text = tf.Qwen2VLTextConfig(**TEXT, rope_parameters=rope)
    config = tf.Qwen2VLConfig(
        text_config=text.to_dict(), vision_config=vision, image_token_id=IMAGE, **UNUSED
    )
    return tf.Qwen2VLForConditionalGeneration(config)


UNUSED = {"video_token_id": -1, "vision_start_token_id": -2, "vision_end_token_id": -3}
"""Tokens that do not occur."""
MODELS = {"llava": (llava, llava_processor), "qwen2_vl": (qwen2_vl, qwen2_vl_processor)}


def batch(makes: Any, count: int, seed: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Inputs, and the targets [B, T] at each place: the next token of an answer, or -100. All
    conversations are of one length.
    """
    drawn = samples(count, seed)
    texts = [makes.apply_chat_template(messages(turns, seen=True)) for _, turns in drawn]
    made = makes(
        text=texts,
        images=[[picture] for picture, _ in drawn],
        add_special_tokens=False,
        return_tensors="pt",
    )
    ids_BT = made["input_ids"]
    begins = ids_BT == VOCABULARY.index("assistant")
    answer_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
    answer_BT[:, 1:] |= begins[:, :-1]  # at ":", the answer comes next
    answer_BT[:, 2:] |= begins[:, :-2]  # and at the answer, its end
    following_BT = ids_BT.roll(-1, dims=1)
    return {**made}, torch.where(answer_BT, following_BT, -100)


def train(model: Any, makes: Any, steps: int, seed: int) -> float:
    """Until it answers well; returns the share of right answers."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    model.train()
    right = 0.0
    for step in range(steps):
        inputs, targets_BT = batch(makes, BATCH, seed=1_000_000 * (seed + 1) + step)
        loss = cross_entropy(model(**inputs).logits.flatten(0, 1), targets_BT.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            right = share_right(model, makes)
            print(f"  step {step + 1}: loss {loss.item():.3f}, right {right:.1%}", flush=True)
            model.train()
    return right


@torch.no_grad()
def share_right(model: Any, makes: Any) -> float:
    """Of 600 questions about 200 pictures that nobody has seen."""
    inputs, targets_BT = batch(makes, 200, seed=7)
    likeliest_BT = model.eval()(**inputs).logits.argmax(-1)
    hit_BT = (likeliest_BT == targets_BT)[targets_BT != -100].reshape(-1, 2)  # word and end
    return hit_BT.all(1).float().mean().item()


def recipe(
    folder: Path, method: str, images: bool, windows: int, sparsities: list[float], seed: int
) -> dict[str, Any]:
    data: dict[str, Any] = {"data": str(folder / "calibration/seen.jsonl"), "images": True}
    if not images:
        data = {"data": str(folder / "calibration/told.jsonl"), "column": "messages", "pack": False}
    held = {"data": str(folder / "held/seen.jsonl"), "images": True}
    text: dict[str, Any] = {
        "model": {"source": str(folder / "dense")},
        "sparsity": sparsities,
        "method": method,
        "seed": seed,
        "calibration": {**data, "windows": windows, "length": LENGTH},
        "evaluation": {"answers": held},
        "importance": {"windows": 64, "batch": 16},
        "cluster": {"engine": "local"},
        "output": {"uri": str(folder / "out"), "name": f"{method}-{'seen' if images else 'told'}"},
    }
    if method == "fusegpt":
        text["fusion"] = {"rank": 16, "lora_rank": 16, "batch": 8, "start": "none"}
        text["heal"] = {"train": "all", "batch": 8, "learning_rate": 0.0003, "held_out": 16}
        text["heal"] |= {"tokens": windows * LENGTH}
    return text


def once(
    kind: str, folder: Path, steps: int, windows: int, sparsities: list[float], seed: int
) -> dict[str, tuple[float, float]]:
    """Perplexity of the answers and share of right ones, by model."""
    torch.manual_seed(seed)
    model, makes = (make() for make in MODELS[kind])
    began = time.monotonic()
    right = train(model, makes, steps, seed)
    print(f"  trained in {time.monotonic() - began:.0f} s, right {right:.1%}", flush=True)
    assert right >= ENOUGH, "the model has not learned its task: give it more --steps"
    model.save_pretrained(folder / "dense")
    makes.save_pretrained(folder / "dense")
    write(folder / "calibration", windows + 128, seed=11)
    write(folder / "held", 200, seed=7)
    found: dict[str, tuple[float, float]] = {}
    for name, (method, images) in RUNS.items():
        asked = recipe(folder, method, images, windows, sparsities, seed)
        for published in compress(Recipe.parse(asked), display=Display()):
            manifest = published.manifest
            row, removed = manifest["perplexity"]["answers"], manifest["removed"]
            found.setdefault("dense", (row["dense"], right))
            plain = tf.AutoModelForImageTextToText.from_pretrained(
                published.uri, dtype=torch.float32
            )
            last = row.get("healed", row["dropped"])
            found[f"{len(removed)} {name}"] = (last, share_right(plain, makes))
            print(f"  {name}: {last:.3f}, without {removed}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="llava")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--windows", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.25, 0.5])
    given = parser.parse_args()
    every = []
    with tempfile.TemporaryDirectory() as temporary:
        for seed in range(given.seeds):
            folder = Path(temporary) / str(seed)
            print(f"seed {seed}", flush=True)
            asked = (given.steps, given.windows, given.sparsity, seed)
            every.append(once(given.model, folder, *asked))
    print(f"\n| {BLOCKS} blocks, without | perplexity of the answers | right |\n|---|---:|---:|")
    for name in every[0]:
        perplexity, right = (statistics.median(run[name][i] for run in every) for i in (0, 1))
        print(f"| {name} | {perplexity:.3f} | {right:.1%} |")


if __name__ == "__main__":
    main()
