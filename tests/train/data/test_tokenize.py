"""Chats: tokenised as a server tokenises its prompts, answers found in them, with tools, parts and opened reasoning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from loray.errors import DataError
from loray.train.data.formats import chats
from loray.train.data.tokenize import conversations
from tests.fixtures.chats import CALLING, EXPECTED, OFFERED, TOOLS, with_template
from tests.fixtures.tiny import byte_tokenizer
from tests.fixtures.training_data import END, TOKENIZER, jsonl, learned, load, whole

LLAMA_2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<s>[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }} </s>{% endif %}{% endfor %}"
)
R1 = (  # leaves the reasoning out of finished turns, and opens it in the prompt
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|im_start|>A{{ m['content'].split('</think>')[-1] }}"
    "<|im_end|>{% else %}<|im_start|>U{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>A<think>\n{% endif %}"
)


def sentencepiece() -> Any:
    """As Llama 2's: a space at the beginning of a text and after a special token, and "▁" for every space."""
    characters = ["▁", *map(chr, range(33, 127)), "▁a", "▁ab", "▁[", "/I"]
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *characters])}
    merges = [("▁", "a"), ("▁a", "b"), ("▁", "["), ("/", "I")]
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = LLAMA_2
    return fast


def chat(*turns: str, **fields: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)], **fields}


@pytest.mark.parametrize("turns", [("a", "ab c"), ("ab [x]", "a", "b", " ab"), ("a b", "[ab", "a", "", "c", "/I")])
def test_every_answer_follows_the_tokens_of_the_servers_prompt(tmp_path: Path, turns: tuple[str, ...]) -> None:
    tokenizer, record = sentencepiece(), chat(*turns)
    ids, targets = load(jsonl(tmp_path, record), tokenizer).train.row(0)
    begins = [i for i in range(1, len(ids)) if targets[i] and not targets[i - 1]]
    assert len(begins) == len(turns) // 2
    for number, begin in enumerate(begins):
        asked = record["messages"][: 2 * number + 1]
        prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        assert ids[:begin].tolist() == tokenizer(prompt, add_special_tokens=False)["input_ids"]
    whole = tokenizer.apply_chat_template(record["messages"], tokenize=False)
    assert ids.tolist() == tokenizer(whole, add_special_tokens=False)["input_ids"]


def test_a_completion_goes_on_in_its_prompt(tmp_path: Path) -> None:
    """Apart from it, it would begin with another space."""
    tokenizer = sentencepiece()
    rows = load(jsonl(tmp_path, {"prompt": "ab:", "completion": " ab"}), tokenizer, format="raw").train
    assert tokenizer.convert_ids_to_tokens(rows.row(0)[0].tolist()) == ["▁ab", ":", "▁ab", "</s>"]
    assert rows.row(0)[1].tolist() == [False, False, True, True]


def test_an_answer_goes_on_from_the_reasoning_that_the_prompt_opened(tmp_path: Path) -> None:
    tokenizer = with_template(R1)
    record = chat("q", "<think>\nwhy\n</think>\n\nb", "r", "<think>\nhow\n</think>\n\nc")
    rows = load(jsonl(tmp_path, record), tokenizer).train
    assert [learned(rows, i) for i in range(2)] == [f"why\n</think>\n\nb{END}", f"how\n</think>\n\nc{END}"]
    assert (
        whole(rows, 1)
        == f"<|im_start|>Uq<|im_start|>A\n\nb{END}<|im_start|>Ur<|im_start|>A<think>\nhow\n</think>\n\nc{END}"
    )


def test_an_answer_without_reasoning_is_written_as_the_template_has_it(tmp_path: Path) -> None:
    tokenizer = with_template(R1)
    rows = load(jsonl(tmp_path, chat("q", "<b", "r", "c")), tokenizer).train
    assert learned(rows, 0) == f"<b{END}c{END}"
    assert len(rows.lengths) == 1


def test_tools_and_text_parts(tmp_path: Path) -> None:
    tokenizer = with_template(TOOLS)
    rows = load(jsonl(tmp_path, CALLING, chat("a", "b")), tokenizer).train
    assert learned(rows, 0) == EXPECTED
    assert whole(rows, 0).startswith("Tadd<|im_start|>user:one\ntwo<|im_end|>")
    assert whole(rows, 1).startswith("<|im_start|>user:a")


def test_tools_in_a_table(tmp_path: Path) -> None:
    """Which has nulls wherever another message has a value, and tools as JSON."""
    messages = [dict(message) for message in CALLING["messages"]]
    messages[0]["content"] = "one\ntwo"
    table = pa.Table.from_pylist([{"messages": messages, "tools": json.dumps(OFFERED)}, chat("a", "b")])
    pq.write_table(table, tmp_path / "tools.parquet")
    tokenizer = with_template(TOOLS)
    rows = load(str(tmp_path / "tools.parquet"), tokenizer).train
    assert [learned(rows, i) for i in range(2)] == [EXPECTED, f"b{END}"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (chat("a", "b", tools=OFFERED), "template does not know tools: write them"),
        (chat("a", "b", tools="[1"), "`tools` is a string that is not JSON"),
        (chat("a", "b", tools=[1]), "`tools` must be a list of objects"),
        (chat("a", "b", tools={"a": 1}), "`tools` must be a list, not dict"),
        ({"messages": CALLING["messages"]}, "template does not know tool_calls"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "a string or a list of text parts"),
        ({"messages": [{"role": 1, "content": "a"}]}, "needs a `role`"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"name": 1}]}]}, "every one of `tool_calls` needs"),
        (chat("a", "\ud800"), "half of a surrogate pair"),
    ],
)
def test_what_is_wrong_is_said(record: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        conversations(*chats("chat", record), byte_tokenizer())


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('roles must alternate') }}", "line 1: the base's chat template refuses .* must alternate"),
        (
            "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
            "{% if add_generation_prompt %}>>{% endif %}",
            "line 1.*differently from its generation prompt",
        ),
    ],
)
def test_a_template_that_does_not_do_is_refused(tmp_path: Path, template: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(jsonl(tmp_path, chat("a", "b")), with_template(template))


def test_chat_learns_each_assistant_turn_up_to_its_end(tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        *chat("one", "eins", "two", "zwei", "no answer")["messages"],
    ]
    rows = load(jsonl(tmp_path, {"messages": messages})).train
    assert learned(rows, 0) == f"eins{END}zwei{END}"
    assert whole(rows, 0) == TOKENIZER.apply_chat_template(messages[:5], tokenize=False).removesuffix("\n")


def test_a_template_that_rewrites_earlier_turns_gives_one_row_per_turn(tmp_path: Path) -> None:
    tokenizer = with_template(  # as Qwen3's: reasoning only in the last turn
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['role'] == 'assistant' and loop.last %}<think></think>{% endif %}{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    rows = load(jsonl(tmp_path, chat("a", "b", "c", "d")), tokenizer).train
    assert [learned(rows, i) for i in range(len(rows.lengths))] == [f"<think></think>b{END}", f"<think></think>d{END}"]
    assert f"b{END}" in whole(rows, 1)
    assert "<think></think>b" not in whole(rows, 1)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one message"),
        ([{"role": "user", "content": "a"}], "no assistant turn"),
        ([{"role": "assistant", "content": "a"}], "starts with the assistant"),
        ([*chat("a")["messages"], {"role": "assistant", "content": None}], "a string or a list of text parts"),
    ],
)
def test_bad_conversations(tmp_path: Path, messages: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(jsonl(tmp_path, {"messages": messages}))
