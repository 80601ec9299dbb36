"""Thoughts are told from content by tokens: after prompts of Qwen3's and R1's forms, and however deltas are cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loray.bases.registry import BaseModel
from loray.errors import SpecError
from loray.spec import FinishReason, GenerateRequest, SamplingParams, Thinking, TokenDelta, TokenLogprobs, Tool, ToolUse
from loray.text.chat import Dialect, Dialects
from loray.text.detokenizer import RequestText
from loray.text.reasoning import ThoughtReader, detect
from loray.text.templates import ChatTemplates
from loray.text.tokenizer import Tokenizer
from tests.fixtures.answers import collected
from tests.fixtures.thinking import END_THINK, EOS, QWEN3, R1, TEMPLATES, THINK, text_ids

ASKED = {"role": "user", "content": "1 + <think> 2?"}
Based = Callable[[str], BaseModel]


def dialect_of(base: BaseModel, **options: Any) -> Dialect:
    dialects = Dialects(base.name, ChatTemplates.load(base.path), Tokenizer.load(base.path), **options)
    return dialects.find(None, None, with_tools=False)


def state_after(dialect: Dialect, messages: Sequence[dict[str, Any]], **options: Any) -> str:
    prompt = dialect.tokenizer.encode(dialect.render(messages, **options), special=False)
    thinking = dialect.thinking(prompt, 7)
    assert thinking is not None
    assert (thinking.start_id, thinking.end_id, thinking.budget) == (THINK, END_THINK, 7)
    return thinking.state


def test_templates_tell_whether_a_model_thinks(thinking_base: Based, base: BaseModel) -> None:
    markers = ("<think>", "</think>", "<|im_end|>")
    assert [detect(markers, template) for template in (QWEN3, R1, "{{ messages }}")] == ["qwen3", "deepseek_r1", None]
    assert detect(("<|im_end|>",), QWEN3) is None
    assert dialect_of(thinking_base("qwen3")).thinks
    assert not dialect_of(base).thinks
    assert dialect_of(base).thinking((1, 2), None) is None
    plain = ChatTemplates({"default": "{{ messages }}"})
    dialects = Dialects("b", plain, Tokenizer.load(thinking_base("qwen3").path), reasoning_parser="deepseek_r1")
    assert dialects.find(None, None, with_tools=False).thinks
    assert dialects.find(None, "an adapter's own", with_tools=False).thinks
    with pytest.raises(SpecError, match="<think> and </think> are no tokens of the base"):
        dialect_of(base, reasoning_parser="qwen3")


def test_the_prompt_tells_where_the_thought_is(thinking_base: Based) -> None:
    qwen3, r1 = dialect_of(thinking_base("qwen3")), dialect_of(thinking_base("deepseek_r1"))
    said = {"role": "assistant", "content": "3", "reasoning_content": "hm"}
    assert state_after(qwen3, [ASKED]) == "may be"
    assert state_after(qwen3, [ASKED, said, ASKED]) == "may be"
    assert state_after(qwen3, [ASKED], variables={"enable_thinking": False}) == "over"
    assert state_after(r1, [ASKED]) == state_after(r1, [ASKED, said, ASKED]) == "open"
    continued: dict[str, Any] = {"add_generation_prompt": False, "continue_final_message": True}
    begun = {"role": "assistant", "content": "<think>\nso far"}
    assert state_after(qwen3, [ASKED, begun], **continued) == "open"
    assert state_after(qwen3, [ASKED, said], **continued) == "over"
    plain = {"role": "assistant", "content": "3"}
    assert state_after(qwen3, [ASKED, plain], **continued) == "may be"


THOUGHT, CONTENT = "Let me see…\n<tool_call> é", "So it is 3.\n"
CASES: dict[str, tuple[str, str, Any]] = {  # state, answer, what is read of it
    "its own": ("may be", f"<think>\n{THOUGHT}\n</think>\n\n{CONTENT}", (THOUGHT, CONTENT)),
    "of the prompt": ("open", f"\n\n{THOUGHT}\n\n</think>{CONTENT}", (THOUGHT, CONTENT)),
    "empty": ("may be", f"<think>\n\n</think>\n\n{CONTENT}", ("", CONTENT)),
    "empty and open": ("open", f"</think>{CONTENT}", ("", CONTENT)),
    "none": ("may be", f"\n{CONTENT}</think><think>", ("", f"\n{CONTENT}</think><think>")),
    "over": ("over", f"\n{CONTENT}", ("", f"\n{CONTENT}")),
    "endless": ("open", f"\n{THOUGHT}\n", (THOUGHT, "")),
    "another after it": ("open", f"{THOUGHT}</think>a<think>b</think>", (THOUGHT, "a<think>b</think>")),
}


def read(
    tokenizer: Tokenizer, state: Any, ids: Sequence[int], cuts: Sequence[int], *, stop: Sequence[str] = (), **more: Any
) -> Any:
    """The choice that is collected of an answer that comes in pieces."""
    end: FinishReason = "length" if ids[-1] != EOS else "stop"
    thinking = Thinking(start_id=THINK, end_id=END_THINK, state=state)
    params = SamplingParams(stop=tuple(stop), logprobs=more.pop("logprobs", None), **more.pop("params", {}))
    text = RequestText(tokenizer, GenerateRequest("r", (1, 2), params), thinking=thinking, **more)
    deltas = []
    places = [0, *sorted(cuts), len(ids)]
    for start, stop_at in pairwise(places):
        piece = tuple(ids[start:stop_at])
        scores = tuple(TokenLogprobs(-1.0, (), 1) for _ in piece) if params.logprobs is not None else None
        deltas.append(text.push(TokenDelta(piece, end if stop_at == len(ids) else None, 0, scores)))
        if deltas[-1].finish_reason is not None:
            break
    return collected(*deltas)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("end", [(), (EOS,)], ids=["length", "stop"])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_thought_is_apart_however_it_comes(
    thinking_base: Based, case: str, end: tuple[int, ...], data: st.DataObject
) -> None:
    tokenizer = Tokenizer.load(thinking_base("qwen3").path)
    state, answer, (thought, content) = CASES[case]
    ids = [*text_ids(answer), *end]
    cuts = data.draw(st.lists(st.integers(0, len(ids)), max_size=6))
    choice = read(tokenizer, state, ids, cuts, logprobs=0)
    assert (choice.reasoning, choice.text) == (thought, content)
    assert choice.finish_reason == ("stop" if end else "length")
    assert choice.num_output_tokens == len(ids) == len(choice.logprobs)
    opened, closed = ids.index(THINK) + 1 if ids[0] == THINK else 0, END_THINK in ids
    num = (ids.index(END_THINK) if closed else len(ids)) - opened if ids[0] == THINK or state == "open" else 0
    assert choice.num_reasoning_tokens == num
    hidden = read(tokenizer, state, ids, cuts, include_reasoning=False)
    assert (hidden.reasoning, hidden.text, hidden.num_reasoning_tokens) == ("", content, num)


def test_stop_strings_are_found_in_the_content_alone(thinking_base: Based) -> None:
    tokenizer = Tokenizer.load(thinking_base("qwen3").path)
    ids = text_ids("<think>\n\na. b\n\n</think>\n\nc. d\n\ne")
    for stop, content in ((".", "c"), ("\n\n", "c. d"), ("a", "c. d\n\ne")):
        for cuts in ([], range(1, len(ids))):
            choice = read(tokenizer, "may be", ids, [*cuts], stop=[stop])
            assert (choice.reasoning, choice.text) == ("a. b", content)
            assert choice.finish_reason == ("stop" if stop != "a" else "length")
    num_thought = ids.index(END_THINK) + 1
    late = read(tokenizer, "may be", ids, [], stop=["."], params={"min_tokens": num_thought + 5})
    assert late.text == "c. d\n\ne"
    early = read(tokenizer, "may be", ids, [], stop=["."], params={"min_tokens": num_thought})
    assert (early.text, early.num_output_tokens) == ("c", num_thought + 4)


def test_calls_in_a_thought_are_none(thinking_base: Based) -> None:
    dialect = dialect_of(thinking_base("qwen3"))
    use = ToolUse((Tool("add", {"type": "object"}),))
    call = '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>'
    ids = (*text_ids(f"<think>\nI call {call}\n</think>\n\n{call}"), EOS)
    text = dialect.text_of(GenerateRequest("r", (1,), SamplingParams()), use, thinking=dialect.thinking((1,), None))
    choice = collected(*(text.push(TokenDelta((token,), "stop" if token == EOS else None)) for token in ids))
    assert choice.reasoning == f"I call {call}"
    assert (choice.text, choice.finish_reason) == ("", "tool_calls")
    assert [call.name for call in choice.tool_calls if call.name] == ["add"]


@given(state=st.sampled_from(["open", "may be"]), ids=st.lists(st.sampled_from([1, THINK, END_THINK]), max_size=9))
def test_reading_tokens_one_by_one_or_together_is_the_same(state: Any, ids: list[int]) -> None:
    thinking = Thinking(start_id=THINK, end_id=END_THINK, state=state)
    one, together = ThoughtReader(thinking), ThoughtReader(thinking)
    for token in ids:
        one.read([token])
    together.read(ids)
    found = [(r.is_open, r.content_from, r.num_tokens, r.num_read) for r in (one, together)]
    assert found[0] == found[1]


def test_the_templates_are_as_their_models(thinking_base: Based) -> None:
    """What was thought after the last question stays in Qwen3's prompt, and R1's has none of it."""
    said = {"role": "assistant", "content": "3", "reasoning_content": "hm", "tool_calls": []}
    result = {"role": "tool", "content": "x", "tool_call_id": "1"}
    shown = {name: dialect_of(thinking_base(name)).render([ASKED, said, result]) for name in TEMPLATES}
    assert "<think>\nhm\n</think>\n\n3" in shown["qwen3"]
    assert "hm" not in shown["deepseek_r1"]
