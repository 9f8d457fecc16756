"""`fusegpt speed`: what is run, what is said of it, and what is refused. No test asks how long."""

from __future__ import annotations

import json
import re
import statistics
import sys
import types
from typing import Any

import pytest
import torch
from desk import Desk
from mistakes import MESSAGE, tree
from models import save_tiny
from safetensors.torch import load_file
from spoilt import configured

from fusegpt_ray.cli import main
from fusegpt_ray.measuring import generators
from fusegpt_ray.measuring.checkpoint import Checkpoint
from fusegpt_ray.measuring.speed import Trial, prompts, speed

SMALL = ["--prompt", "6", "--new", "4", "--runs", "3", "--batch", "2"]


def test_models_are_timed_side_by_side(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny("qwen3", desk.folder / "other")  # without a tokenizer: prompts are tokens
    assert main(["speed", "model", "other", *SMALL, "--json", "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["runner"].startswith("transformers ")
    assert found["trial"]["runs"] == 3 and found["versions"]["torch"] == torch.__version__
    first, second = found["models"]
    for row, folder in ((first, desk.model), (second, desk.folder / "other")):
        assert row["model"] == folder.name and row["dtype"] == "float32"
        tensors = load_file(folder / "model.safetensors").values()
        assert row["weights_bytes"] == sum(tensor.nbytes for tensor in tensors)
        for what, tokens in (("prefill", 2 * 6), ("decode", 2)):
            times, base = row[what], first[what]
            assert len(times["runs"]) == 3
            middle = statistics.median(times["runs"])
            assert times["seconds"]["median"] == middle
            assert times["tokens_per_second"] == pytest.approx(tokens / middle)
            turns = [b / r for b, r in zip(base["runs"], times["runs"], strict=True)]
            assert times["times_as_fast"] == pytest.approx(
                {"median": statistics.median(turns), "low": min(turns), "high": max(turns)}
            )
    if torch.cuda.is_available():
        assert first["peak_bytes"] > first["weights_bytes"]
    else:
        assert first["peak_bytes"] is None


def test_the_table_tells_how_the_times_came_about(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["speed", "model", *SMALL]) == 0
    told = capsys.readouterr().out
    head, prefill, decode = [line.split() for line in told.splitlines() if "─" not in line][1:4]
    assert head == ["model", "ms", "tokens/s", "times", "as", "fast", "memory"]
    assert prefill[:2] == ["model", "prefill"] and decode[0] == "decode"
    said = " ".join(told.split())
    assert "medians of 3 turns" in said and "prefill: 2 × 6 tokens" in said
    if not torch.cuda.is_available():
        assert "what the work takes beside them is not counted here" in said


def test_a_turn_is_one_prefill_and_a_pass_for_each_further_token(desk: Desk) -> None:
    """By the tokens that enter the real model: the cache is used, and nothing ends it early."""
    checkpoint = Checkpoint.open(str(desk.model))
    ids_BP = prompts([checkpoint.config], Trial(prompt=6, batch=2))
    work = generators.Work(ids_BP, 4, 1)
    plain = generators.opened("transformers", checkpoint, str(desk.model), "float32", work)
    assert isinstance(plain, generators.Plain)
    entered: list[tuple[int, ...]] = []
    plain.model.get_input_embeddings().register_forward_pre_hook(
        lambda _, inputs: entered.append(tuple(inputs[0].shape))
    )
    for turn in (1, 2):
        found = plain.turn()
        assert found.prefill > 0 and found.decode > 0
        assert entered == [(2, 6), (2, 1), (2, 1), (2, 1)] * turn


def test_settings_of_the_checkpoint_change_nothing(desk: Desk) -> None:
    """Such as an end after the first token, or a search of many beams."""
    tokens = list(range(101))
    (desk.model / "generation_config.json").write_text(
        json.dumps({"eos_token_id": tokens, "num_beams": 3, "do_sample": True})
    )
    found = speed([str(desk.model)], Trial(prompt=6, new=4, runs=1))
    assert len(found["models"][0]["decode"]["runs"]) == 1


def test_memory_is_that_of_the_dtype_in_which_weights_compute(desk: Desk) -> None:
    (row,) = speed([str(desk.model)], Trial(prompt=6, new=4, runs=1, dtype="bfloat16"))["models"]
    tensors = load_file(desk.model / "model.safetensors").values()
    assert row["weights_bytes"] == sum(2 * tensor.numel() for tensor in tensors)


@pytest.mark.gpu
def test_the_first_model_is_not_charged_for_what_the_process_takes_once(desk: Desk) -> None:
    """Such as workspaces, which come with the first product of matrices."""
    models = [str(desk.model)] * 2
    first, second = speed(models, Trial(prompt=6, new=4, runs=1))["models"]
    assert first["peak_bytes"] == second["peak_bytes"]


def test_prompts_are_the_same_ordinary_tokens_for_all_models() -> None:
    llama = {"model_type": "llama", "vocab_size": 8, "bos_token_id": 1, "eos_token_id": [2, 3]}
    llava = {
        "model_type": "llava",
        "image_token_index": 5,
        "text_config": {"model_type": "llama", "vocab_size": 11},
    }
    trial = Trial(prompt=500, batch=2)
    ids_BP = prompts([llama, llava], trial)
    assert ids_BP.shape == (2, 500) and set(ids_BP.flatten().tolist()) == {0, 4, 6, 7}
    assert torch.equal(ids_BP, prompts([llama, llava], trial))


BAD = {
    "positions": (["--prompt", "61"], "--prompt", "longer than the 64 positions", "at most 64"),
    "no-vllm": (["--with", "vllm"], "--with", "not installed", "pip install vllm"),
    "no-model": (["nowhere"], "MODEL", "no such folder", "existing folder"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_is_one_message_and_nothing_is_written(
    name: str,
    desk: Desk,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    arguments, key, problem, fix = BAD[name]
    before = tree(desk.folder)
    assert main(["speed", "model", *SMALL, *arguments]) == 2
    stdout, stderr = capsys.readouterr()
    message = MESSAGE.search(stderr)
    assert message and stdout == "" and stderr.count("error: ") == 1, stderr
    assert message["key"].endswith(key) and problem in message["problem"]
    assert re.search(fix, message["fix"]) and tree(desk.folder) == before


def test_a_model_whose_weights_would_be_invented_is_refused(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers fills what is missing with random values, and only warns."""
    weights = desk.model / "model.safetensors"
    weights.write_bytes(weights.read_bytes().replace(b"model.norm.weight", b"model.norm.wrong_"))
    assert main(["speed", "model", *SMALL]) == 2
    assert "missing_keys ['model.norm.weight']" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["speed", *SMALL], ["tasks", "--tasks", "piqa"]])
def test_a_quantized_model_is_refused_with_what_measures_it(
    command: list[str], desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    configured(quantization_config={"quant_method": "awq", "bits": 4})(desk)
    assert main([command[0], "model", *command[1:]]) == 2
    message = MESSAGE.search(capsys.readouterr().err)
    assert message and message["key"] == "MODEL" and "quantized checkpoint (awq)" in message[0]
    assert "made from" in message["fix"] and "lm_eval" in message["fix"]


def test_vllm_is_asked_for_whole_prefills_and_exactly_so_many_tokens(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM is not among what tests install; what stands in for it here keeps to its interface."""
    asked: list[dict[str, Any]] = []

    class LLM:
        def __init__(self, **options: Any) -> None:
            asked.append(options)

        def generate(self, given: Any, params: Any, use_tqdm: bool) -> list[Any]:
            asked.append({"prompts": given, **params})
            output = types.SimpleNamespace(token_ids=[0] * params["max_tokens"])
            return [types.SimpleNamespace(outputs=[output]) for _ in given]

    module = types.ModuleType("vllm")
    module.__spec__ = types.SimpleNamespace(name="vllm")  # type: ignore[assignment]
    module.LLM, module.SamplingParams = LLM, dict  # type: ignore[attr-defined]
    module.__version__ = "0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    for name in ("VLLM_LOGGING_STREAM", "VLLM_LOGGING_LEVEL"):  # set as vLLM is imported
        monkeypatch.setenv(name, "")
    model = str(desk.model)
    checkpoint = Checkpoint.open(model)
    work = generators.Work(prompts([checkpoint.config], Trial(prompt=6, batch=2)), 4, 2)
    generators.opened("vllm", checkpoint, model, "float32", work).turn()
    options, *calls = asked
    assert options["model"] == model and options["enable_prefix_caching"] is False
    assert options["max_model_len"] == 10 and options["gpu_memory_utilization"] == 0.45
    assert options["dtype"] == "float32" and options["skip_tokenizer_init"]
    assert [call["max_tokens"] for call in calls] == [1, 4]
    for call in calls:
        assert call["ignore_eos"]
        assert [one["prompt_token_ids"] for one in call["prompts"]] == work.ids_BP.tolist()
