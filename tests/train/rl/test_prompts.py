"""Prompts as tokens: as a server renders them, and turns after sampled tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loray.errors import DataError
from loray.spec import DataSpec
from loray.train.rl.prompts import Prompts, Speech, read_prompts
from tests.fixtures.tiny import byte_tokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token if m.role == 'assistant' }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def read(
    rows: list[dict[str, Any]],
    folder: Path,
    tokenizer: Any,
    max_length: int = 200,
    needed: tuple[str, ...] = (),
    **data: Any,
) -> Prompts:
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    spec = DataSpec(train=str(folder / "rows.jsonl"), **data)
    speech = Speech(tokenizer, raw=spec.format == "raw", system=spec.system)
    return read_prompts(spec, speech, max_length=max_length, max_eval_rows=100, seed=0, needed=needed)


def texts(prompts: Prompts, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(prompt.ids) for prompt in prompts.train]


def test_rows_are_rendered_and_kept_whole(tmp_path: Path, tokenizer: Any) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "1 or 2?", "answer": 2},
        {"prompt": [{"role": "user", "content": "3 or 4?"}], "answer": 4},
    ]
    found = read(rows, tmp_path, tokenizer, eval_fraction=0)
    assert texts(found, tokenizer) == ["<user>1 or 2?\n<assistant>", "<user>3 or 4?\n<assistant>"]
    assert [prompt.row for prompt in found.train] == rows
    assert found.held_out == ()


def test_an_answer_in_the_data_is_not_shown(tmp_path: Path, tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    found = read([{"messages": messages}], tmp_path, tokenizer, eval_fraction=0, system="Be brief.")
    assert texts(found, tokenizer) == ["<system>Be brief.\n<user>a\n<assistant>"]


def test_without_a_template_texts_stand_as_they_are(tmp_path: Path, tokenizer: Any) -> None:
    found = read([{"prompt": "1 or 2?"}], tmp_path, tokenizer, eval_fraction=0, format="raw")
    assert texts(found, tokenizer) == ["1 or 2?"]
    with pytest.raises(DataError, match="line 1: messages need a chat template"):
        read([{"messages": [{"role": "user", "content": "a"}]}], tmp_path, tokenizer, format="raw")


def test_rows_are_held_out(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": str(i)} for i in range(20)]
    found = read(rows, tmp_path, tokenizer, eval_fraction=0.25)
    assert (len(found.train), len(found.held_out)) == (15, 5)
    assert {str(p.row["prompt"]) for p in (*found.train, *found.held_out)} == {str(i) for i in range(20)}
    assert read(rows, tmp_path, tokenizer, eval_fraction=0.25) == found


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([{"prompt": "a"}, {"prompt": ""}, {"prompt": 3}], "line 3: `prompt` must be a string|line 3"),
        ([{"question": "a"}], "neither `messages` nor `prompt`, but question"),
        ([{"messages": [{"role": "assistant", "content": "b"}]}], "line 1: a conversation needs a message"),
        ([{"prompt": "a" * 300}], "line 1: the prompt has .* tokens, more than data.max_length"),
    ],
)
def test_bad_rows(rows: list[dict[str, Any]], told: str, tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=told):
        read(rows, tmp_path, tokenizer)


@pytest.mark.parametrize("wrong", [{"prompt": "a", "other": 1}, {"prompt": "a", "answer": None}])
def test_a_row_without_what_the_reward_reads(wrong: dict[str, Any], tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": "a", "answer": 0}] * 9
    assert len(read(rows, tmp_path, tokenizer, needed=("answer",), eval_fraction=0.5).held_out) > 0
    with pytest.raises(DataError, match="line 7: the row has no `answer`, which the reward reads"):
        read([*rows[:6], wrong, *rows], tmp_path, tokenizer, needed=("answer",), eval_fraction=0.5)


def test_observations_go_on_after_sampled_tokens(tokenizer: Any) -> None:
    speech = Speech(tokenizer)
    prompt, answer = speech.prompt("a"), tuple(tokenizer("b").input_ids)
    eos = (tokenizer.eos_token_id,)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    whole = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ended = (*prompt, *answer, *eos, *speech.observation("c", ended=True))
    cut = (*prompt, *answer, *speech.observation("c", ended=False))
    assert tokenizer.decode(ended) == tokenizer.decode(cut) == whole
    assert speech.observation([5, 6], ended=True) == (5, 6)
    assert speech.text((*answer, *eos)) == "b"
