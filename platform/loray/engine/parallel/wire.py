"""Steps as bytes between ranks: integers of 64 bits, so that sending one waits for no device. Of a recorded decode
step: its parts, how many there are of each field, the fields. Of another one: its chunks, of which each rank makes a
batch of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import accumulate, islice, pairwise
from typing import Any, NamedTuple

import numpy as np

from loray.engine.scheduling.plan import Chunk
from loray.spec import GenerateRequest, SamplingParams
from loray_kernels import DecodeStep, Parts

_STEP_HEAD = len(DecodeStep._fields)  # the parts, and a number for each of the others


def dump_step(step: DecodeStep) -> bytes:
    fields = [np.asarray(getattr(step, name), dtype=np.int64) for name in DecodeStep._fields if name != "parts"]
    head = np.array([int(step.parts), *map(len, fields)], dtype=np.int64)
    return np.concatenate([head, *fields]).tobytes()


def load_step(data: bytes) -> DecodeStep:
    words = np.frombuffer(data, dtype=np.int64)
    starts = accumulate(words[1:_STEP_HEAD].tolist(), initial=_STEP_HEAD)
    fields: list[Any] = [words[start:stop] for start, stop in pairwise(starts)]
    fields.insert(DecodeStep._fields.index("parts"), Parts(int(words[0])))
    return DecodeStep(*fields)


class PassedChunk(NamedTuple):
    """A chunk of a request that only rank 0 has, and the request itself, as far as `build_batch` reads them.

    adapter  its digest; None is the base
    is_last  its last token's logits are needed
    """

    adapter: str | None
    start: int
    num_tokens: int
    is_last: bool
    scored: range
    token_ids: list[int]
    blocks: list[int]

    @property
    def request(self) -> PassedChunk:
        return self

    @property
    def spec(self) -> GenerateRequest:
        return _sampled()

    def tokens(self, start: int, stop: int) -> list[int]:
        return self.token_ids[start - self.start : stop - self.start]


@cache
def _sampled() -> GenerateRequest:
    """As far as `build_batch` reads it. Only ranks beside the first have one."""
    return GenerateRequest("", (), SamplingParams(max_tokens=1))


def dump_chunks(chunks: Sequence[Chunk]) -> tuple[bytes, tuple[str, ...]]:
    """The step's numbers, and the digests of its adapters, which they name by place; −1 is the base."""
    place: dict[str | None, int] = {None: -1}
    words: list[int] = []
    for chunk in chunks:
        request, stop, scored = chunk.request, chunk.start + chunk.num_tokens, chunk.scored
        wanted = chunk.is_last and request.spec.params.max_tokens > 0
        adapter = place.setdefault(request.adapter_digest, len(place) - 1)
        words += (adapter, chunk.start, chunk.num_tokens, wanted, scored.start, scored.stop, len(request.blocks))
        words += request.tokens(chunk.start, stop)
        words += request.blocks
    return np.array(words, dtype=np.int64).tobytes(), tuple(digest for digest in place if digest is not None)


def load_chunks(data: bytes, digests: Sequence[str]) -> list[PassedChunk]:
    words = iter(np.frombuffer(data, dtype=np.int64).tolist())
    chunks = []
    for adapter in words:
        start, num_tokens, wanted, first, end, num_blocks = islice(words, 6)
        token_ids, blocks = list(islice(words, num_tokens)), list(islice(words, num_blocks))
        digest, scored = None if adapter < 0 else digests[adapter], range(first, end)
        chunks.append(PassedChunk(digest, start, num_tokens, bool(wanted), scored, token_ids, blocks))
    return chunks
