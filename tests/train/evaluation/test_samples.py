"""Prompts of held-out rows, and the greedy answers of base and adapter to them."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from loray.bases.registry import BaseModel
from loray.spec import OBJECTIVES, DataSpec, ObjectiveType, Subject
from loray.train.data.batches import pack_rows
from loray.train.data.rows import load_data
from loray.train.evaluation import samples
from loray.train.evaluation.documents import HeldOutPrompt, held_out_prompts
from loray.train.evaluation.measure import MeasuredModel, load, measure, subjects
from loray.train.evaluation.samples import Answers, greedy_answers
from tests.fixtures.peft_adapters import make_adapter
from tests.fixtures.tiny import byte_tokenizer

CPU = torch.device("cpu")


def held_out(folder: Path, *rows: dict[str, Any], objective: ObjectiveType = "sft") -> tuple[HeldOutPrompt, ...]:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec, learns = DataSpec(train=str(folder / "rows.jsonl"), eval=str(folder / "rows.jsonl")), OBJECTIVES[objective]
    data = load_data(spec, byte_tokenizer(), max_length=128, max_eval_rows=64, seed=0, formats=learns.formats)
    return held_out_prompts(data.evaluation, learns.sequences_per_row)


def texts(prompts: tuple[HeldOutPrompt, ...]) -> list[tuple[str, str]]:
    tokenizer = byte_tokenizer()
    return [tuple(map(tokenizer.decode, prompt)) for prompt in prompts]  # type: ignore[misc]


def words(prompts: tuple[HeldOutPrompt, ...]) -> list[tuple[str, str]]:
    """What is asked and what is answered, without what the chat template writes around them."""
    found = texts(prompts)
    marks = r"<\|im_\w+\|>|\buser\b|\bassistant\b"
    return [(re.sub(marks, "", prompt).strip(), re.sub(marks, "", answer).strip()) for prompt, answer in found]


def test_three_prompts_are_spread_over_the_rows(tmp_path: Path) -> None:
    found = held_out(tmp_path, *({"prompt": f"ask {i}:", "completion": f" answer {i}"} for i in range(9)))
    assert words(found) == [(f"ask {i}:", f"answer {i}") for i in (0, 4, 8)]


def test_a_chat_is_asked_up_to_its_first_answer(tmp_path: Path) -> None:
    turns = ("user", "one?"), ("assistant", "1"), ("user", "two?"), ("assistant", "2")
    (found,) = texts(held_out(tmp_path, {"messages": [{"role": role, "content": text} for role, text in turns]}))
    assert found == ("<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\n", "1<|im_end|>")


def test_of_a_pair_the_chosen_answer_is_the_expected_one(tmp_path: Path) -> None:
    pairs = ({"prompt": f"{i} + 1 =", "chosen": f" {i + 1}", "rejected": " ?"} for i in range(2))
    found = held_out(tmp_path, *pairs, objective="dpo")
    assert words(found) == [("0 + 1 =", "1"), ("1 + 1 =", "2")]


def test_of_answers_that_are_good_or_bad_the_good_ones_are_expected(tmp_path: Path) -> None:
    rows = ({"prompt": f"{i} + 1 =", "completion": f" {i + i % 2}", "label": i % 2 == 1} for i in range(4))
    found = held_out(tmp_path, *rows, objective="kto")
    assert words(found) == [("1 + 1 =", "2"), ("3 + 1 =", "4")]


def test_texts_have_no_prompt_and_long_ones_are_left_out(tmp_path: Path) -> None:
    assert held_out(tmp_path, {"text": "abc"}, {"text": "defg"}) == ()
    assert held_out_prompts(pack_rows([]), 1) == ()
    long = pack_rows([([1] * 1030, [False] * 1029 + [True]), ([1] * 9, [False] * 8 + [True])])
    assert [len(prompt.ids) for prompt in held_out_prompts(long, 1)] == [8]


@pytest.fixture(scope="module")
def base(tiny_base: Callable[..., BaseModel]) -> BaseModel:
    return tiny_base(std=0.3)


def naive(model: Any, ids: list[int], num_tokens: int) -> list[int]:
    """Without a cache."""
    for _ in range(num_tokens):
        with torch.no_grad():
            ids = [*ids, int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())]
    return ids[-num_tokens:]


def test_answers_are_the_most_likely_ones_and_end(base: BaseModel) -> None:
    """Whatever their prompts' lengths are, and each for itself."""
    model = load(base, MeasuredModel("base"), dtype="float32", device=CPU).model
    prompts = [[5, 80, 33, 41, 7], [9, 12], [61] * 9]
    expected = [naive(model, prompt, 48) for prompt in prompts]
    assert greedy_answers(model, prompts, -1) == expected
    end = expected[0][5]
    assert greedy_answers(model, prompts, end) == [
        answer[: answer.index(end)] if end in answer else answer for answer in expected
    ]
    clock = itertools.count(0.0, 8.0)
    assert greedy_answers(model, prompts, -1, lambda: next(clock)) == [answer[:2] for answer in expected]


def test_base_and_adapter_answer_the_same_prompts(base: BaseModel, tmp_path: Path) -> None:
    make_adapter(base, tmp_path / "adapter", LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), seed=1, std=2.0)
    told: list[str] = []
    prompt = HeldOutPrompt(tuple(range(65, 80)), (66, 7, 67, 258))
    answers = Answers(base, [prompt], told.append)
    models = subjects(None, tmp_path / "adapter", compare=True)
    assert measure(base, models, dtype="float32", look=answers.take) == ()
    (sample,) = answers.samples()
    assert list(sample) == ["prompt", "expected", "base", "adapter"]
    assert sample["base"] != sample["adapter"]
    tokenizer = byte_tokenizer()
    assert sample["prompt"] == tokenizer.decode(prompt.ids)
    assert "\x07" not in "".join(sample.values())
    assert told == ["answering held-out prompts, base", "answering held-out prompts, adapter"]


def test_what_nobody_asked_for_is_not_loaded(base: BaseModel) -> None:
    answers = Answers(base, [], lambda stage: pytest.fail("told"))
    subject: Subject
    for subject in ("base", "base_scaled", "adapter"):
        answers.take(subject, lambda: pytest.fail("loaded"))
    assert answers.samples() == []


def test_a_long_prompt_shows_its_end_and_a_failure_leaves_no_sample(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = Answers(base, [HeldOutPrompt((*[65] * 500, 66), (67,))], lambda stage: None)
    model = load(base, MeasuredModel("base"), dtype="float32", device=CPU)
    answers.take("base", lambda: model)
    with monkeypatch.context() as patched:
        patched.setattr(samples, "greedy_answers", refuse)
        answers.take("adapter", lambda: model)
    assert answers.samples() == []
    answers.take("adapter", lambda: model)
    (sample,) = answers.samples()
    assert sample["prompt"].startswith("…")
    assert len(sample["prompt"]) == samples._SHOWN + 1


def refuse(*_: object) -> None:
    raise RuntimeError("out of memory")
