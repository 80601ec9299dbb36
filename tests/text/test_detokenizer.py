"""The text of a request's tokens: complete characters, stop strings, special tokens."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from loray.bases.registry import BaseModel
from loray.spec import (
    Delta,
    GenerateRequest,
    SamplingParams,
    TokenDelta,
    TokenLogprobs,
    Tool,
    ToolCallDelta,
    ToolUse,
)
from loray.text.detokenizer import Detokenizer, RequestText
from loray.text.tokenizer import Tokenizer
from loray.text.tools import parser_for


@pytest.fixture(scope="module")
def tokenizer(base: BaseModel) -> Tokenizer:
    return Tokenizer.load(base.path)


@pytest.mark.parametrize(
    ("text", "params", "pieces"),
    [
        ("aé→😀", {}, ["a", "", "é", "", "", "→", "", "", "", "😀", ""]),
        ("one END two", {"stop": ("END",)}, [*"one ", "", "", ""]),
        ("one END", {"stop": ("D", "END"), "include_stop_str_in_output": True}, [*"one ", "", "", "END"]),
        ("END END", {"stop": ("END",), "min_tokens": 2}, [*"END ", "", "", ""]),
        ("EN EEND", {"stop": ("END!", "XX")}, ["", "", "EN ", "", "E", "", "", "END"]),  # held back, and then given
    ],
)
def test_text_comes_in_whole_characters_up_to_a_stop_string(
    tokenizer: Tokenizer, text: str, params: dict[str, Any], pieces: list[str]
) -> None:
    detokenizer, found = Detokenizer(tokenizer, SamplingParams(**params)), list[Any]()
    for token in tokenizer.encode(text, special=False):
        found.append(detokenizer.push((token,)))
        if found[-1].stop is not None:
            break
    else:
        found.append(detokenizer.push((), "length"))
    assert [piece.text for piece in found] == pieces
    assert (found[-1].stop is not None) == ("END" in params.get("stop", ()))


def test_a_token_that_ends_the_request_is_no_text_unless_asked_for(tokenizer: Tokenizer) -> None:
    a, b, eos = tokenizer.encode("ab<|im_end|>", special=False)
    for params, token, text in (
        ({}, b, "a"),
        ({"include_stop_str_in_output": True}, b, "ab"),
        ({"include_stop_str_in_output": True}, eos, "a"),
        ({"include_stop_str_in_output": True, "skip_special_tokens": False}, eos, "a<|im_end|>"),
    ):
        detokenizer = Detokenizer(tokenizer, SamplingParams(**params))
        assert detokenizer.push((a,)).text + detokenizer.push((token,), "stop").text == text


def test_bytes_that_never_become_a_character_end_as_replacement(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer, SamplingParams())
    assert detokenizer.push(tokenizer.encode("é", special=False)[:1]).text == ""
    assert detokenizer.push((), "length").text == "\ufffd"


def test_the_space_before_the_first_word_stays() -> None:
    """SentencePiece tokenizers write ▁word and drop the space where a text begins."""
    tokenizer = Backend(
        models.WordLevel({"▁The": 0, "▁capital": 1, "▁Paris": 2, "!": 3, "<unk>": 4}, unk_token="<unk>")
    )
    tokenizer.decoder = decoders.Metaspace()
    detokenizer = Detokenizer(Tokenizer(tokenizer), SamplingParams(), [0, 1])
    assert [detokenizer.push((2,)).text, detokenizer.push((3,), "length").text] == [" Paris", "!"]


def request(tokenizer: Tokenizer, **params: Any) -> GenerateRequest:
    return GenerateRequest("r", tokenizer.encode("abc", special=False), SamplingParams(**params))


def test_merged_deltas_have_the_same_text_as_single_ones(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("naïve → END of it", special=False)
    for stop in ((), ("END",)):
        r = request(tokenizer, stop=stop)
        one_by_one, merged = RequestText(tokenizer, r), RequestText(tokenizer, r)
        pieces: list[Delta] = []
        for i, t in enumerate(ids):
            pieces.append(one_by_one.push(TokenDelta((t,), "length" if i == len(ids) - 1 else None)))
            if pieces[-1].finish_reason:
                break
        whole = merged.push(TokenDelta(ids, "length"))
        assert "".join(p.text for p in pieces) == whole.text == ("naïve → " if stop else "naïve → END of it")
        assert pieces[-1].finish_reason == whole.finish_reason == ("stop" if stop else "length")
        assert pieces[-1].num_output_tokens == whole.num_output_tokens == sum(len(p.token_ids) for p in pieces)
        assert whole.num_prompt_tokens == 3


def test_calls_of_tools_are_told_from_text(tokenizer: Tokenizer) -> None:
    class Upper:
        """Takes capital letters for the name of a tool, and gives it at the end."""

        def __init__(self) -> None:
            self.name = ""

        def push(self, text: str) -> list[str | ToolCallDelta]:
            self.name += "".join(c for c in text if c.isupper())
            return ["".join(c for c in text if not c.isupper())]

        def finish(self) -> list[str | ToolCallDelta]:
            return [ToolCallDelta(0, "call-0", self.name, "{}"), "."]

    text = RequestText(tokenizer, request(tokenizer), Upper())
    ids = tokenizer.encode("aBcD", special=False)
    assert (text.push(TokenDelta(ids[:2])).text, text.push(TokenDelta(ids[2:3])).text) == ("a", "c")
    last = text.push(TokenDelta(ids[3:], "length"))
    assert (last.text, last.tool_calls) == (".", (ToolCallDelta(0, "call-0", "BD", "{}"),))


def test_a_parser_sees_the_special_tokens_that_it_needs(tokenizer: Tokenizer) -> None:
    use = ToolUse((Tool("add", {}),))
    ids = tokenizer.encode('<|im_start|>a<tool_call>{"name": "add", "arguments": {}}<|im_end|>b', special=False)
    for kept, said in ((frozenset[str](), "ab"), (frozenset(["<|im_start|>"]), "<|im_start|>ab")):
        text = RequestText(tokenizer, request(tokenizer), parser_for("hermes", use), kept)
        deltas = [text.push(TokenDelta((t,), "stop" if i == len(ids) else None)) for i, t in enumerate((*ids, 258))]
        assert "".join(d.text for d in deltas) == said
        assert "".join(call.arguments for d in deltas for call in d.tool_calls) == "{}"
        assert deltas[-1].finish_reason == "tool_calls"
        assert {d.finish_reason for d in deltas[:-1]} == {None}


def test_log_probabilities_get_their_texts(tokenizer: Tokenizer) -> None:
    a, b = tokenizer.encode("ab", special=False)
    scores = TokenLogprobs(-0.5, ((b, -0.1), (a, -0.5)), 2)
    text = RequestText(tokenizer, request(tokenizer, logprobs=2, prompt_logprobs=0))
    delta = text.push(TokenDelta((a,), logprobs=(scores,), prompt_logprobs=(scores, scores)))
    assert delta.logprobs is not None
    (lp,) = delta.logprobs
    assert (lp.token_id, lp.token, lp.logprob, lp.rank) == (a, "a", -0.5, 2)
    assert lp.top == ((b, "b", -0.1), (a, "a", -0.5))
    assert delta.prompt_logprobs is not None
    assert [(p.token, p.logprob) for p in delta.prompt_logprobs] == [("a", None), ("b", -0.5), ("c", -0.5)]
