"""A served model as the teacher of distillation, which the driver asks about the rows of a run.

The key of its server is in TEACHER_API_KEY of the driver's environment, and in no recipe, event or file.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loray.client import LorayClient
from loray.errors import DataError, EngineError, LorayError, NotFoundError, PermissionDenied, SpecError, Unauthenticated
from loray.spec import Teaching
from loray.train.data.lessons import TOP, Top
from loray.train.data.tokenize import prompt_ids

KEY = "TEACHER_API_KEY"
_AT_ONCE = 8  # requests: a server computes them in one batch
_FIRST_RETRY_S, _RETRY_S = 5.0, 600.0  # of a request: the first ones; the others, while the server restarts
# Digits, spaces, accents, scripts and signs: what tokenizers of one family differ in.
_PROBE = "The price of 1,234.50 kg:  naïve café — Straße, Привет, 你好, こんにちは 🙂\n\tdef f(x): return x**2  # ½ €"


class ServedTeacher(LorayClient):
    """A model behind an OpenAI-compatible URL whose completions have `prompt_logprobs`, as loray's and vLLM's have."""

    def __init__(self, teaching: Teaching, key: str | None = None) -> None:
        assert teaching.url is not None
        url = teaching.url.rstrip("/").removesuffix("/v1")
        # Without a key of its own no other one is sent, such as LORAY_API_KEY.
        super().__init__(url, api_key=key or os.environ.get(KEY) or "none", retry_s=_FIRST_RETRY_S)
        self._teaching = teaching

    def name(self) -> list[object]:
        """Name what answers: another version under the same alias is another teacher. Raises SpecError."""
        label = f"objective.teacher {self._teaching.model!r} of {self.base_url}"
        try:
            found = self._request("GET", f"/v1/models/{self._teaching.model}").json()
        except NotFoundError as e:
            raise SpecError(f"{label}: {e}; `curl {self.base_url}/v1/models` lists what is served") from e
        except (Unauthenticated, PermissionDenied) as e:
            raise SpecError(f"{label}: {e}; set {KEY} to a key of that server where the driver runs") from e
        except (LorayError, ValueError) as e:
            raise SpecError(f"{label} does not answer: {e}") from e
        found = found if isinstance(found, dict) else {}
        return [self.base_url, self._teaching.model, *(found.get(field) for field in ("root", "parent", "digest"))]

    def check(self, tokenizer: Any) -> None:
        """Raise SpecError where the teacher cannot be asked, gives too few tokens, or has another tokenizer."""
        label = f"objective.teacher {self._teaching.model!r} of {self.base_url}"
        ids = prompt_ids(tokenizer, [_PROBE])[0]
        try:
            its_ids = [next(iter(token)) for token in self._prompt_logprobs(_PROBE, 0)]
        except _Lacking as e:
            raise SpecError(f"{label} {e}; ask a server that does: loray's and vLLM's do") from e
        except LorayError as e:
            raise SpecError(f"{label} cannot be asked: {e}") from e
        if its_ids != ids[1:]:
            raise SpecError(
                f"{label} has another tokenizer than this base: it makes {len(its_ids) + 1} tokens of a text of which "
                f"the base's makes {len(ids)}; distil from a model of the same family"
            )
        try:
            self.top(np.array(ids, np.int32))
        except LorayError as e:
            raise SpecError(f"{label} refuses objective.top_k {self._teaching.num_top}: {e}; lower it") from e

    def answers(self, rows: Iterable[NDArray[np.int32]]) -> Iterator[Top]:
        """Ask about rows, several at a time."""
        self._retry_s = _RETRY_S
        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="teacher") as pool:
            yield from pool.map(self.top, rows)

    def top(self, ids: NDArray[np.int32]) -> Top:
        """Ask about the tokens of one row after its first. Raises LorayError."""
        tokens = self._prompt_logprobs(ids.tolist(), self._teaching.num_top)
        if len(tokens) != len(ids) - 1:
            raise DataError(f"the teacher answers for {len(tokens)} of {len(ids) - 1} tokens of a row")
        found: Top = np.empty((len(tokens), self._teaching.num_top), TOP)
        for at, token in enumerate(tokens):
            best = sorted(token.items(), key=lambda item: -item[1])[: self._teaching.num_top]
            if len(best) < self._teaching.num_top:
                raise DataError(f"the teacher gives {len(best)} tokens a position")
            found[at] = best
        return found

    def _prompt_logprobs(self, prompt: str | list[int], num: int) -> list[dict[int, float]]:
        """Ask for log-probabilities by token id of each token of a prompt but the first."""
        body = {"model": self._teaching.model, "prompt": prompt, "max_tokens": 1, "prompt_logprobs": num}
        response = self._request("POST", "/v1/completions", again=True, json=body | {"temperature": 0})
        try:
            (choice,) = response.json()["choices"]
            given = choice.get("prompt_logprobs")
            if given is None:
                raise _Lacking("gives no prompt_logprobs")
            return [{int(i): float(entry["logprob"]) for i, entry in token.items()} for token in given[1:]]
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise EngineError(f"its answer is not of this API: {response.text[:200]!r}") from e


class _Lacking(DataError):
    pass
