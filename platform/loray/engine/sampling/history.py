"""What the sampler keeps of a request, so that a token's cost in Python does not grow with the tokens before it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from loray.engine.request import Request
from loray.spec import GenerateRequest
from loray_kernels import TokenEdits, TokenSet

N = TypeVar("N", bound=np.generic)
Tokens = npt.NDArray[np.int64]
Values = npt.NDArray[np.float64]


class Occurrences:
    """Distinct tokens in the order of their first occurrence, with how often each occurred, and a value of each."""

    def __init__(self, token_ids: Iterable[int] = (), *, value: float = 0.0, others: float = 0.0) -> None:
        """`value`: of all of `token_ids`; `others`: of tokens that have not occurred."""
        counts: dict[int, int] = {}
        for token in token_ids:
            counts[token] = counts.get(token, 0) + 1
        self._places = {token: place for place, token in enumerate(counts)}
        self._counts = list(counts.values())
        self._tokens = np.array([*counts], dtype=np.int64)
        self._values: Values = np.full(len(counts), value)
        self._others = others
        self._dense: npt.NDArray[np.float32] | None = None

    @property
    def tokens(self) -> Tokens:
        return self._tokens[: len(self._counts)]

    @property
    def values(self) -> Values:
        return self._values[: len(self._counts)]

    def __len__(self) -> int:
        return len(self._counts)

    def dense(self, vocab_size: int) -> npt.NDArray[np.float32]:
        """A value for each token of the vocabulary. Made at the first call, and kept from then on."""
        if self._dense is None:
            self._dense = np.full(vocab_size, self._others, dtype=np.float32)
            self._dense[self.tokens] = self.values
        return self._dense

    def add(self, token: int) -> int:
        """One more occurrence; returns how many there are now."""
        place = self._places.setdefault(token, len(self._counts))
        if place == len(self._counts):
            self._counts.append(0)
            if place == len(self._tokens):
                self._tokens, self._values = _grown(self._tokens), _grown(self._values)
            self._tokens[place] = token
        self._counts[place] += 1
        return self._counts[place]

    def set_value(self, token: int, value: float) -> None:
        self._values[self._places[token]] = value
        if self._dense is not None:
            self._dense[token] = value


class BadWords:
    """vLLM's bad_words: a word's last token may not follow its other tokens."""

    def __init__(self, words: Sequence[tuple[int, ...]]) -> None:
        self._always = [word[0] for word in words if len(word) == 1]
        self._by_previous: dict[int, list[tuple[int, ...]]] = {}
        for word in words:
            if len(word) > 1:
                self._by_previous.setdefault(word[-2], []).append(word)

    def after(self, output_ids: Sequence[int]) -> list[int]:
        """Tokens that may not be next."""
        words = self._by_previous.get(output_ids[-1], ()) if output_ids else ()
        return self._always + [w[-1] for w in words if tuple(output_ids[1 - len(w) :]) == w[:-1]]


class History:
    """Of one request. `read` takes in its tokens; the rest is what they mean for the logits of the next one.

    repeated  tokens of prompt and output, with their repetition penalty
    produced  tokens of the output, with what frequency and presence penalty add to their logits
    """

    def __init__(self, spec: GenerateRequest, eos_token_ids: Sequence[int]) -> None:
        p = self._params = spec.params
        self._ends = p.stop_token_ids if p.ignore_eos else (*p.stop_token_ids, *eos_token_ids)
        self._bad_words = BadWords(p.bad_words) if p.bad_words else None
        self._num_read = 0
        self.allowed = None if p.allowed_token_ids is None else np.array(sorted({*p.allowed_token_ids}), dtype=np.int64)
        self.bias = np.array([*p.logit_bias], dtype=np.int64), np.array([*p.logit_bias.values()], dtype=np.float64)
        self.repeated: Occurrences | None = None
        if (penalty := p.repetition_penalty) != 1:
            self.repeated = Occurrences(spec.prompt_ids, value=penalty, others=1.0)
        self.produced = Occurrences() if p.presence_penalty or p.frequency_penalty else None
        self._edits: TokenEdits | None = None
        self._allowed_set: TokenSet | None = None

    def read(self, output_ids: Sequence[int]) -> None:
        """Take in the tokens that came since the last call."""
        p = self._params
        for token in output_ids[self._num_read :]:
            factor = added = None
            if self.repeated is not None and self.repeated.add(token) == 1:
                factor = p.repetition_penalty
                self.repeated.set_value(token, factor)
            if self.produced is not None:
                added = -(p.frequency_penalty * self.produced.add(token) + p.presence_penalty)
                self.produced.set_value(token, added)
            if self._edits is not None and (factor is not None or added is not None):
                self._edits.set(token, factor, added)
        self._num_read = len(output_ids)

    @property
    def edits(self) -> TokenEdits | None:
        """Biases and penalties, for a device: made at the first call, and followed by `read` from then on."""
        has_none = self.repeated is None and self.produced is None and not self._params.logit_bias
        if self._edits is None and not has_none:
            edits = self._edits = TokenEdits()
            edits.set_all("bias", *self.bias)
            for name, found in (("factor", self.repeated), ("added", self.produced)):
                if found is not None:
                    edits.set_all(name, found.tokens, found.values)
        return self._edits

    def allowed_set(self, vocab_size: int) -> TokenSet | None:
        """`allowed`, for a device."""
        if self._allowed_set is None and self.allowed is not None:
            self._allowed_set = TokenSet(self.allowed, vocab_size)
        return self._allowed_set

    @property
    def is_over(self) -> bool:
        """No later token's logits are changed: there was a minimum length alone."""
        steady = (self._bad_words, self.allowed, self.repeated, self.produced, self._params.logit_bias or None)
        return self._num_read >= self._params.min_tokens and all(cause is None for cause in steady)

    def forbidden(self, output_ids: Sequence[int], *, may_end: bool) -> Tokens:
        """Tokens that may not be next. `may_end`: also before min_tokens, as nothing else is allowed."""
        tokens = [] if self._bad_words is None else self._bad_words.after(output_ids)
        if len(output_ids) < self._params.min_tokens and not may_end:
            tokens.extend(self._ends)
        return np.array(tokens, dtype=np.int64)


def history_of(request: Request, eos_token_ids: Sequence[int]) -> History | None:
    """The request's, with all tokens of its output; None where it changes nothing any more."""
    history = request.history
    if not isinstance(history, History):
        history = request.history = History(request.spec, eos_token_ids)
    history.read(request.output_ids)
    request.changes_logits = not history.is_over
    return history if request.changes_logits else None


def _grown(array: npt.NDArray[N]) -> npt.NDArray[N]:
    return np.concatenate((array, np.zeros(max(64, len(array)), dtype=array.dtype)))
