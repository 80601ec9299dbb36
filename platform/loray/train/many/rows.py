"""Which rows of a pass are whose.

Shapes: M tokens of a pass, N those of a bucket, I inputs of a module.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from loray.train.many.stacks import Bucket, Kind


class Run(NamedTuple):
    """`num` adapters in neighbouring slots, with as many tokens and the same scale each.

    tokens  of a bucket's N
    """

    tokens: slice
    slots: slice
    num: int
    scale: float


class Groups(NamedTuple):
    """A bucket's adapters for one product of all of them: their slots, ends of their tokens, scales of tokens."""

    slots: Tensor
    ends: Tensor
    scales_N1: Tensor


@dataclass(frozen=True)
class Part:
    """The rows of one bucket's adapters, which are neighbours.

    tokens  of the pass's M
    seeds   of the dropout of each adapter, with its tokens of the bucket's N
    groups  where one product of all adapters is used
    """

    bucket: Bucket
    tokens: slice
    runs: tuple[Run, ...]
    seeds: tuple[tuple[slice, int], ...] = ()
    groups: Groups | None = None

    @property
    def num_tokens(self) -> int:
        return length(self.tokens)

    def drop(self, x_NI: Tensor, path: str) -> Tensor:
        """Multiply an input of a module by the mask of its dropout, which is the same in every call."""
        dropout = self.bucket.key.dropout
        noise_NI = torch.empty_like(x_NI)
        number = self.bucket.paths.index(path)
        for tokens, seed in self.seeds:
            generator = torch.Generator(x_NI.device).manual_seed(seed + number)
            noise_NI[tokens].bernoulli_(1 - dropout, generator=generator)
        return x_NI * noise_NI.div_(1 - dropout)


@dataclass
class Rows:
    """The rows of one pass, and what its modules have in common."""

    parts: tuple[Part, ...]
    num_tokens: int
    shared: tuple[Tensor, dict[tuple[int, str], Tensor]] | None = None  # of the last input, see `lora.inner_products`
    _of: dict[tuple[str, tuple[Kind, ...]], list[Part]] = field(default_factory=dict)

    def of(self, path: str, *kinds: Kind) -> list[Part]:
        """List the parts that adapt this module by a method of these kinds."""
        found = self._of.get((path, kinds))
        if found is None:
            found = [part for part in self.parts if part.bucket.key.kind in kinds and path in part.bucket.inputs]
            self._of[path, kinds] = found
        return found


class Member(NamedTuple):
    """An adapter of a pass: where it is in its bucket, its tokens, and the seed of its dropout if it has any."""

    bucket: Bucket
    slot: int
    scale: float
    num_tokens: int
    seed: int | None


def lay_out(members: Sequence[Member], grouped: torch.device | None = None) -> Rows:
    """Make the rows of adapters in this order, which is by bucket and slot. `grouped`: a device with such products."""
    parts: list[Part] = []
    start = first = 0
    while first < len(members):
        bucket = members[first].bucket
        last = next((i for i in range(first, len(members)) if members[i].bucket is not bucket), len(members))
        part = _part(members[first:last], start, grouped)
        parts.append(part)
        start, first = part.tokens.stop, last
    return Rows(tuple(parts), start)


def _part(members: Sequence[Member], start: int, grouped: torch.device | None) -> Part:
    runs: list[Run] = []
    seeds: list[tuple[slice, int]] = []
    at = 0
    for _, slot, scale, num_tokens, seed in members:
        end = at + num_tokens
        if seed is not None:
            seeds.append((slice(at, end), seed))
        last = runs[-1] if runs else None
        is_next = last is not None and last.slots.stop == slot and last.scale == scale
        if last is not None and is_next and length(last.tokens) == last.num * num_tokens:
            runs[-1] = Run(slice(last.tokens.start, end), slice(last.slots.start, slot + 1), last.num + 1, scale)
        else:
            runs.append(Run(slice(at, end), slice(slot, slot + 1), 1, scale))
        at = end
    groups = None
    if grouped is not None and len(runs) > 1 and members[0].bucket.key.rank % 8 == 0:
        numbers = torch.tensor([(slot, num_tokens) for _, slot, _, num_tokens, _ in members], device=grouped)
        scales = torch.tensor([member.scale for member in members], device=grouped)
        ends = numbers[:, 1].cumsum(0, dtype=torch.int32)
        groups = Groups(numbers[:, 0], ends, scales.repeat_interleave(numbers[:, 1])[:, None])
    return Part(members[0].bucket, slice(start, start + at), tuple(runs), tuple(seeds), groups)


def length(numbers: slice) -> int:
    num: int = numbers.stop - numbers.start
    return num
