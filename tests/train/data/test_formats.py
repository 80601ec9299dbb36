"""Formats of rows: each is found by its columns, becomes the chat that a server would have, and says what is wrong."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from loray.errors import DataError
from loray.spec import DpoSpec
from loray.text.templates import ChatTemplate
from loray.train.data.formats import FORMATS, chats
from tests.fixtures.chats import CALLING, EXPECTED, OFFERED, TOOLS, with_template
from tests.fixtures.tiny import byte_tokenizer
from tests.fixtures.training_data import END, TOKENIZER, Counted, jsonl, learned, load, whole

USER, ASSISTANT = ({"role": role, "content": f"{role[0]}?"} for role in ("user", "assistant"))
SYSTEM = {"role": "system", "content": "Be brief."}
MESSAGES = [SYSTEM, {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
SHAREGPT = {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]}


def rendered(*messages: dict[str, Any]) -> str:
    """What a server has of this conversation, up to the end of the last turn."""
    template = ChatTemplate(TOKENIZER.chat_template)
    return template.render(messages, add_generation_prompt=False).removesuffix("\n")


@pytest.mark.parametrize(
    ("format", "record"),
    [
        ("chat", {"messages": MESSAGES}),
        ("chat", {"messages": MESSAGES[1:], "system": "Be brief.", "text": "not this"}),
        ("chat", {"messages": [SYSTEM | {"role": "developer"}, *MESSAGES[1:]]}),
        ("sharegpt", SHAREGPT | {"system": "Be brief."}),
        ("sharegpt", {"conversations": [{"from": "system", "value": "Be brief."}, *SHAREGPT["conversations"]]}),
        ("sharegpt", {"conversations": MESSAGES}),
        ("sharegpt", {"conversations": [SYSTEM, {"from": "gpt", "value": "Hi"}, *SHAREGPT["conversations"]]}),
        ("prompt_completion", {"prompt": "2 + 2?", "completion": "4", "system": "Be brief."}),
        ("prompt_completion", {"prompt": MESSAGES[:2], "completion": MESSAGES[2:]}),
        ("prompt_completion", {"prompt": MESSAGES[:2], "completion": "4"}),
        ("alpaca", {"instruction": "2 + 2?", "input": "", "output": "4", "system": "Be brief.", "text": "not this"}),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_rows_are_the_chats_that_are_served(tmp_path: Path, format: str, record: dict[str, Any], kind: str) -> None:
    path = str(tmp_path / f"data.{kind}")
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist([record, record]), path)
    else:
        rows = [json.dumps(record)] * 2
        Path(path).write_text("\n".join(rows) if kind == "jsonl" else f"[{','.join(rows)}]")
    data = load(path)
    assert data.report.format == format
    assert data.report.rendering == f"{format} rows through the base's chat template"
    assert [whole(data.train, i) for i in (0, 1)] == [rendered(*MESSAGES)] * 2
    assert [learned(data.train, i) for i in (0, 1)] == [f"4{END}"] * 2


def test_the_tokens_before_an_answer_are_those_of_a_request(tmp_path: Path) -> None:
    rows = load(jsonl(tmp_path, {"prompt": "2 + 2?", "completion": "4"})).train
    ids, targets = rows.row(0)
    prompt = ChatTemplate(TOKENIZER.chat_template).render([{"role": "user", "content": "2 + 2?"}])
    assert ids[~targets].tolist() == TOKENIZER(prompt, add_special_tokens=False)["input_ids"]


def test_without_a_template_and_where_raw_is_asked_for_strings_stay_as_they_are(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"prompt": "2 + 2?", "completion": " 4"})
    bare = load(path, with_template(None))  # type: ignore[arg-type]
    raw = load(path, format="raw")
    assert whole(bare.train, 0) == whole(raw.train, 0) == f"2 + 2? 4{END}"
    assert bare.report.rendering == "prompt_completion rows as they stand (the base has no chat template)"
    assert raw.report.rendering == "prompt_completion rows as they stand (data.format is raw)"
    assert whole(load(path).train, 0) != whole(raw.train, 0)


def test_alpaca_without_a_template_is_stanfords(tmp_path: Path) -> None:
    rows = [{"instruction": "Add.", "input": given, "output": "4"} for given in ("2 + 2", "")]
    data = load(jsonl(tmp_path, *rows), format="raw")
    first, second = (whole(data.train, i) for i in (0, 1))
    assert first == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n2 + 2\n\n"
        f"### Response:\n4{END}"
    )
    assert second == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\nAdd.\n\n### Response:\n4{END}"
    )
    assert learned(data.train, 1) == f"4{END}"
    assert whole(load(jsonl(tmp_path, rows[0])).train, 0) == rendered(
        {"role": "user", "content": "Add.\n\n2 + 2"}, {"role": "assistant", "content": "4"}
    )


# -- columns and system prompts


def test_columns_have_the_names_of_the_files(tmp_path: Path) -> None:
    """In JSONL, in a table, and beside a file that has loray's names."""
    first = jsonl(tmp_path, {"question": "2 + 2?", "answer": "4", "rules": "Be brief.", "prompt": 7})
    second = jsonl(tmp_path, {"prompt": "2 + 2?", "completion": "4", "system": "Be brief."}, name="b.jsonl")
    table = tmp_path / "c.csv"
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([("answer", "rules", "question"), ("4", "Be brief.", "2 + 2?")])
    columns = {"prompt": "question", "completion": "answer", "system": "rules"}
    data = load((first, second, str(table)), columns=columns)
    assert [whole(data.train, i) for i in range(3)] == [rendered(*MESSAGES)] * 3
    with pytest.raises(DataError, match=r"columns question, .*; data\.columns says what yours are called"):
        load(first, columns={"completion": "answers"})


def test_tokens_are_kept_by_how_they_were_made(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"prompt": "2 + 2?", "completion": "4", "other": "5"})
    counted = Counted()
    from loray.train.data.shards import FolderCache

    options = {"cache": FolderCache(tmp_path / "cache"), "run": counted}
    others: list[dict[str, Any]] = [
        {},
        {"format": "raw"},
        {"system": "Be brief."},
        {"columns": {"completion": "other"}},
        {"format": "prompt_completion"},  # as auto
    ]
    found = [whole(load(path, options=options, **fields).train, 0) for fields in others]
    assert (counted.done, len(set(found)), found[0]) == (4, 4, found[4])


def test_the_system_prompt_of_rows_without_one(tmp_path: Path) -> None:
    records = [{"messages": MESSAGES[1:]}, {"messages": [{"role": "system", "content": "Own."}, *MESSAGES[1:]]}]
    rows = load(jsonl(tmp_path, *records), system="Be brief.").train
    assert whole(rows, 0) == rendered(*MESSAGES)
    assert "Own." in whole(rows, 1)
    assert "brief" not in whole(rows, 1)
    with pytest.raises(DataError, match=r"no place for data\.system, because data\.format is raw"):
        load(jsonl(tmp_path, {"prompt": "a", "completion": "b"}), system="Be brief.", format="raw")


# -- what is learned


@pytest.mark.parametrize(("name", "off"), [("train", False), ("weight", 0)])
def test_messages_say_whether_they_are_learned(tmp_path: Path, name: str, off: Any) -> None:
    first = [USER, ASSISTANT | {name: off}, USER | {name: off}, ASSISTANT | {"content": "b", name: type(off)(1)}]
    second = [USER, ASSISTANT | {name: off}]
    data = load(jsonl(tmp_path, {"messages": first}, {"messages": second}, {"messages": [USER, ASSISTANT]}))
    assert [learned(data.train, i) for i in (0, 1)] == [f"b{END}", f"a?{END}"]
    assert whole(data.train, 0) == rendered(USER, ASSISTANT, USER, ASSISTANT | {"content": "b"})
    assert (data.report.num_rows, data.report.num_without_targets) == (2, 1)


def test_all_turns_of_a_completion_are_learned(tmp_path: Path) -> None:
    """Not those of the prompt. With tools, whose calls and results are messages."""
    turns = CALLING["messages"]
    record = {"prompt": [USER, ASSISTANT, *turns[:1]], "completion": turns[1:], "tools": json.dumps(OFFERED)}
    rows = load(jsonl(tmp_path, record), with_template(TOOLS)).train
    assert learned(rows, 0) == EXPECTED


def test_calls_in_sharegpt(tmp_path: Path) -> None:
    said = [
        ("human", "one\ntwo"),
        ("function_call", '{"name": "add", "arguments": {"a": 1}}'),
        ("observation", "2"),
        ("gpt", "two"),
    ]
    record = {"conversations": [{"from": who, "value": what} for who, what in said], "tools": json.dumps(OFFERED)}
    theirs = load(jsonl(tmp_path, record, CALLING | {"conversations": CALLING["messages"]}), with_template(TOOLS)).train
    assert learned(theirs, 0) == EXPECTED
    assert whole(theirs, 0).replace("tool:2", "") == whole(theirs, 1).replace("tool:2", "")


# -- pairs


def test_the_prompt_of_a_pair_may_stand_before_its_answers(tmp_path: Path) -> None:
    """As in data sets whose prompt is a text and whose answers are conversations, and in those without a prompt."""
    asked, yes, no = MESSAGES[1], {"role": "assistant", "content": "4"}, {"role": "assistant", "content": "5"}
    whole_answers = {"chosen": [asked, yes], "rejected": [asked, no]}
    records: list[dict[str, Any]] = [
        {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
        {"prompt": [asked], "chosen": [yes], "rejected": [no]},
        {"prompt": "2 + 2?"} | whole_answers,
        whole_answers,
    ]
    data = load(jsonl(tmp_path, *records), options={"formats": DpoSpec.formats})
    assert [whole(data.train, 2 * i) for i in range(4)] == [rendered(asked, yes)] * 4
    assert [learned(data.train, 2 * i + 1) for i in range(4)] == [f"5{END}"] * 4


def test_pairs_in_the_form_of_openais_fine_tuning(tmp_path: Path) -> None:
    asked, yes, no = MESSAGES[1], {"role": "assistant", "content": "4"}, {"role": "assistant", "content": "5"}
    given = {"messages": [asked], "tools": [], "parallel_tool_calls": True}
    path = jsonl(tmp_path, {"input": given, "preferred_output": [yes], "non_preferred_output": [no]})
    data = load(path, options={"formats": DpoSpec.formats})
    assert data.report.format == "openai_preference"
    assert [whole(data.train, i) for i in (0, 1)] == [rendered(asked, yes), rendered(asked, no)]
    assert [learned(data.train, i) for i in (0, 1)] == [f"4{END}", f"5{END}"]
    bare = jsonl(tmp_path, {"input": "2 + 2?", "preferred_output": [yes], "non_preferred_output": [no]})
    with pytest.raises(DataError, match="`input` is a string that is not JSON"):
        load(bare, options={"formats": DpoSpec.formats})


# -- errors


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": 3, "completion": "a"}, "`prompt` must be a string or a list of messages, not int"),
        ({"prompt": [], "completion": "a"}, "`prompt` must be a list of at least one message"),
        ({"prompt": "a", "completion": [USER]}, "no assistant turn to learn from"),
        ({"prompt": [USER, ASSISTANT], "completion": "a"}, "`prompt` must end before the answer"),
        ({"prompt": "a", "completion": "\ud800"}, "half of a surrogate pair"),
        ({"prompt": "a", "completion": "b", "system": 3}, "`system` must be a string, not int"),
        ({"instruction": "a", "output": None}, "`output` must be a string or a list of messages, not NoneType"),
        ({"instruction": "a", "input": 3, "output": "b"}, "`input` must be a string, not int"),
        ({"conversations": [{"from": "human"}]}, "a message's `content` must be a string"),
        ({"conversations": [{"from": 1, "value": "a"}]}, "needs `from`, as human or gpt, and `value`"),
        ({"conversations": "no"}, "`conversations` is a string that is not JSON"),
        ({"messages": [USER, ASSISTANT | {"weight": 0.5}]}, "`weight` must be 0 or 1, not 0.5"),
        ({"messages": [USER, ASSISTANT | {"train": "yes"}]}, "`train` must be true or false, not 'yes'"),
        ({"messages": [USER | {"train": True}, ASSISTANT]}, "only the assistant's messages are learned"),
    ],
)
def test_what_is_wrong_with_a_row_is_said(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"data.jsonl, line 1: .*{message}"):
        load(jsonl(tmp_path, record))


def test_rows_of_another_format_are_named(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"prompt": "a", "completion": "b"}, {"messages": [USER, ASSISTANT]})
    with pytest.raises(
        DataError,
        match=r"line 2: the row has no `prompt` but messages: all rows of a file have one format, here `prompt` and "
        r"`completion`; put others into a file of their own",
    ):
        load(path)


@pytest.mark.parametrize("format", ["raw", "chat"])
def test_a_format_that_rows_do_not_have_is_refused(tmp_path: Path, format: str) -> None:
    messages = {"raw": "raw learns strings as they stand, and these are chats", "chat": "chat needs `messages`"}
    row = SHAREGPT if format == "raw" else {"text": "a"}
    with pytest.raises(DataError, match=messages[format]):
        load(jsonl(tmp_path, row), format=format)
    bare = byte_tokenizer()
    bare.chat_template = None
    with pytest.raises(DataError, match="holds chats, but the base has no chat template; use prompt/completion"):
        load(jsonl(tmp_path, SHAREGPT), bare)


def test_every_format_is_one_that_a_recipe_may_name() -> None:
    from typing import get_args

    from loray.spec import ColumnNames, DataSpec

    named = set(get_args(DataSpec.model_fields["format"].annotation)) - {"auto", "raw"}
    assert named == set(FORMATS)
    columns = {column for format in FORMATS.values() for column in (*format.columns, *format.optional)}
    assert columns == set(ColumnNames.model_fields)
    assert all(chats(name, {"messages": MESSAGES}) for name in ("chat",))
