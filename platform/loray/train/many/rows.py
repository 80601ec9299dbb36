"""Which rows of a pass are whose, and products of each adapter's rows with its own matrices.

Shapes: M tokens of a pass, N those of a bucket, n those of one adapter, g adapters, S slots.
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


@dataclass(frozen=True)
class Part:
    """The rows of one bucket's adapters, which are neighbours.

    tokens  of the pass's M
    seeds   of the dropout of each adapter, with its tokens of the bucket's N
    """

    bucket: Bucket
    tokens: slice
    runs: tuple[Run, ...]
    seeds: tuple[tuple[slice, int], ...] = ()

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
    shared: tuple[Tensor, dict[tuple[int, str], Tensor]] | None = None  # of the last input, see `lora.inner`
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


def lay_out(members: Sequence[Member]) -> Rows:
    """Make the rows of adapters in this order, which is by bucket and slot."""
    parts: list[Part] = []
    start = first = 0
    while first < len(members):
        bucket = members[first].bucket
        last = next((i for i in range(first, len(members)) if members[i].bucket is not bucket), len(members))
        part = _part(members[first:last], start)
        parts.append(part)
        start, first = part.tokens.stop, last
    return Rows(tuple(parts), start)


def _part(members: Sequence[Member], start: int) -> Part:
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
    return Part(members[0].bucket, slice(start, start + at), tuple(runs), tuple(seeds))


def length(numbers: slice) -> int:
    num: int = numbers.stop - numbers.start
    return num


# -- products --


def each(x_NK: Tensor, num: int) -> Tensor:
    """View the rows of `num` adapters with as many each as (num, n, K)."""
    return x_NK.view(num, -1, x_NK.shape[-1])


def multiply(out_NP: Tensor, x_NK: Tensor, weights_SKP: Tensor, part: Part) -> None:
    """Set each adapter's rows of `out` to those of `x` times its matrix."""
    for tokens, slots, num, _ in part.runs:
        out, x = out_NP[tokens], x_NK[tokens]
        if num == 1:
            torch.mm(x, weights_SKP[slots.start], out=out)
        else:
            torch.bmm(each(x, num), weights_SKP[slots], out=each(out, num))


def add_product(out_NP: Tensor, x_NK: Tensor, weights_SKP: Tensor, part: Part) -> None:
    """Add to each adapter's rows of `out` those of `x` times its matrix times its scale."""
    for tokens, slots, num, scale in part.runs:
        out, x = out_NP[tokens], x_NK[tokens]
        if num == 1:
            torch.addmm(out, x, weights_SKP[slots.start], alpha=scale, out=out)
        else:
            torch.baddbmm(each(out, num), each(x, num), weights_SKP[slots], alpha=scale, out=each(out, num))


def scale_rows(x_NK: Tensor, part: Part) -> None:
    """Multiply each adapter's rows by its scale, in place."""
    for tokens, _, _, scale in part.runs:
        if scale != 1:
            x_NK[tokens] *= scale


def accumulate(gradient_SKP: Tensor, x_NK: Tensor, y_NP: Tensor, part: Part, *, scaled: bool) -> None:
    """Add to each adapter's gradient xᵀ y of its rows, times its scale if `scaled`.

    In 16 bits it is rounded before it is added, as the gradient of a micro-batch is where an adapter trains alone.
    """
    in_place = gradient_SKP.dtype == x_NK.dtype
    for tokens, slots, num, scale in part.runs:
        alpha, x, y = scale if scaled else 1.0, x_NK[tokens], y_NP[tokens]
        if num == 1 and in_place:
            gradient_SKP[slots.start].addmm_(x.t(), y, alpha=alpha)
        elif num == 1:
            gradient_SKP[slots.start].add_(x.t() @ y, alpha=alpha)
        elif in_place:
            gradient_SKP[slots].baddbmm_(each(x, num).mT, each(y, num), alpha=alpha)
        else:
            gradient_SKP[slots].add_(each(x, num).mT @ each(y, num), alpha=alpha)
