"""Languages that are small enough to be written down, and requests that are held to them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cache

import numpy as np
from tokenizers import Tokenizer

from loray.bases.registry import BaseModel
from loray.engine.engine import Engine
from loray.engine.request import Request
from loray.engine.sampling.grammar import Grammars, Masks
from loray.spec import Constraint, GenerateRequest, SamplingParams

EOS = 2
PROMPT = (1, 9690, 198, 2683)


@cache
def token_bytes(path: str) -> dict[int, bytes]:
    """The bytes of each token that is text. GPT-2's alphabet: printable bytes stand for themselves."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    chars = {chr(b): b for b in own}
    chars |= {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in own)}
    tokenizer = Tokenizer.from_file(path)
    special = {i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special}
    return {i: bytes(chars[c] for c in text) for text, i in tokenizer.get_vocab().items() if i not in special}


class Ready:
    """The matchers of requests without an engine."""

    def __init__(self, base: BaseModel) -> None:
        self.grammars, self.vocab = Grammars(base, lambda: None), base.config.vocab_size

    def start(self, constraint: Constraint, *output_ids: int) -> Request:
        spec = GenerateRequest("r", PROMPT, SamplingParams(max_tokens=99, structured=constraint))
        made = Request(spec, 0, output_ids=list(output_ids))
        self.grammars.prepare(made, constraint)
        self.wait([made])
        return made

    def wait(self, requests: Sequence[Request]) -> None:
        """Until the requests' masks have been computed."""
        while any(r.awaits_mask for r in requests):
            self.grammars.end_step()
            assert not self.grammars.take(lambda request: None)

    def masks(self, requests: Sequence[Request]) -> Masks:
        self.grammars.advance(requests)
        self.wait(requests)
        masks = self.grammars.masks(requests)
        assert masks is not None
        return masks

    def allowed(self, *requests: Request) -> list[set[int]]:
        bits = np.unpackbits(self.masks(requests).words_MW.view(np.uint8), axis=1, bitorder="little")
        return [set(np.flatnonzero(row).tolist()) for row in bits]


LANGUAGES: dict[str, tuple[Constraint, list[str]]] = {
    "choice": (
        Constraint.from_choice(["yes", "no", "nope", "n/a", "größer 😀"]),
        ["yes", "no", "nope", "n/a", "größer 😀"],
    ),
    "regex": (
        Constraint.from_regex(r"(ab|abc|b/c\n?)x{0,3}[0-9]"),
        [a + "x" * n + d for a, n, d in itertools.product(("ab", "abc", "b/c", "b/c\n"), range(4), "0123456789")],
    ),
    "lark": (
        Constraint.from_grammar('start: item ("," item)~0..2\nitem: "cat" | "dog" "s"?'),
        [",".join(c) for n in (1, 2, 3) for c in itertools.product(("cat", "dog", "dogs"), repeat=n)],
    ),
    "gbnf": (
        Constraint.from_grammar('root ::= "to" part "!"\npart ::= "day" | "morrow" [0-9]?'),
        [f"to{p}!" for p in ("day", "morrow", *(f"morrow{i}" for i in range(10)))],
    ),
    "json": (
        Constraint.from_schema({"enum": ["a", {"b": [1, True]}, "ab"]}, whitespace=""),
        ['"a"', '{"b":[1,true]}', '"ab"'],
    ),
}


def answers(engine: Engine, requests: Sequence[GenerateRequest]) -> dict[str, tuple[list[int], str]]:
    """The tokens of each request, and how it ended: its finish reason or the name of its error."""
    out: dict[str, tuple[list[int], str]] = {r.request_id: ([], "") for r in requests}
    for r in requests:
        engine.add(r)
    while engine.has_work:
        for token in engine.step():
            ids, _ = out[token.request_id]
            ids += [] if token.token_id is None else [token.token_id]
            end = token.finish_reason or (repr(token.error) if token.error else "")
            out[token.request_id] = (ids, end)
        engine.check_integrity()
    return out
