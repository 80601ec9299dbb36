"""Parameters of many adapters of one shape, side by side in memory.

Shapes: S slots, P numbers of one adapter, R rank, I and O widths of a module, K modules with one input.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from math import prod
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from loray.methods.base import ADAPTER, input_of
from loray.methods.pairs import PairKey
from loray.methods.vera_module import ProjectionBuffer, draw_pair

Kind = Literal["lora", "dora", "vera"]
_ALIGNMENT = 16  # numbers: grouped products want strides of 16 bytes


class BucketKey(NamedTuple):
    """What adapters of one bucket have in common. `pair` is VeRA's."""

    kind: Kind
    rank: int
    modules: tuple[str, ...]
    dropout: float
    pair: PairKey | None


class Piece(NamedTuple):
    """A tensor of this shape that begins at `start` of an adapter's P numbers."""

    start: int
    shape: tuple[int, ...]


class Inputs(NamedTuple):
    """Modules of one layer, by path, that an adapter multiplies with the same input: q, k and v; gate and up.

    `a` are their matrices A one below the other, (K R, I); VeRA's A is shared and not here. With dropout each module
    has an input of its own.
    """

    paths: tuple[str, ...]
    a: Piece | None


class Parameters(NamedTuple):
    """A part of an adapter's numbers in which an optimizer treats all alike; `example` is the name of one."""

    example: str
    numbers: slice


@dataclass
class Memory:
    """Tensors (S, P) in fp32: the weights and what an optimizer holds of them. Rows of free slots hold anything."""

    master: Tensor
    gradient: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


class Bucket:
    """Adapters of one shape, each in a slot: one row of every tensor of `memory`.

    Names of parameters are those of a model to which `attach` has added such an adapter.
    """

    def __init__(
        self, key: BucketKey, linears: Mapping[str, tuple[int, int]], dtype: torch.dtype, device: torch.device
    ) -> None:
        """`linears` has (O, I) of the adapted modules by path, in the model's order."""
        self.key = key
        self.projection = None if key.pair is None else ProjectionBuffer(draw_pair(*key.pair))
        self._dtype, self._device = dtype, device
        self._free: list[int] = []
        self.num_slots = 0  # which have been used
        self.paths = tuple(linears)
        self.inputs: dict[str, Inputs] = {}
        self.pieces: dict[str, Piece] = {}  # by name of the parameter
        self.parameters: list[Parameters] = []
        self.placed: list[Piece] = []  # each is one tensor of all slots for products
        self._size = 0
        self._lay_out(linears)
        self.memory = Memory(*(torch.empty(0, self._size) for _ in fields(Memory)))
        # By piece: what products read and write. In 16 bits those that read are tensors of their own, in one piece: on
        # a CPU products of a view with other strides copy it first.
        self._compute: dict[Piece, Tensor] = {}
        self._gradient: dict[Piece, Tensor] = {}
        self.norms: dict[tuple[str, int], Tensor] = {}  # of DoRA, by path and slot, since the last refresh

    def _lay_out(self, linears: Mapping[str, tuple[int, int]]) -> None:
        """Place one kind of parameter after the other, so that each is one range of numbers."""
        kind, rank = self.key.kind, self.key.rank
        for paths in _by_input(list(linears), apart=self.key.dropout > 0):
            width = linears[paths[0]][1]
            a = None if kind == "vera" else self._place((rank * len(paths), width))
            self.inputs |= dict.fromkeys(paths, Inputs(paths, a))
            for i, path in enumerate(paths):
                if a is not None:
                    self.pieces[self.name(path, "a")] = Piece(a.start + i * rank * width, (rank, width))
        if kind != "vera":
            self.parameters.append(Parameters(self.name(self.paths[0], "a"), slice(0, self._size)))
        for part in {"lora": "b", "dora": "bm", "vera": "db"}[kind]:
            begin = self._size
            for path, (out, _) in linears.items():
                shapes = {"d": (rank,), "m": (out,), "b": (out,) if kind == "vera" else (out, rank)}
                self.pieces[self.name(path, part)] = self._place(shapes[part])
            self.parameters.append(Parameters(self.name(self.paths[0], part), slice(begin, self._size)))

    def _place(self, shape: tuple[int, ...]) -> Piece:
        start = self._size
        self._size += -(-prod(shape) // _ALIGNMENT) * _ALIGNMENT
        self.placed.append(Piece(start, shape))
        return self.placed[-1]

    def name(self, path: str, kind: str) -> str:
        """Name the parameter of this kind of a module: a, b, or DoRA's m, or VeRA's d."""
        if self.key.kind == "vera":
            return f"{path}.vera_lambda_{kind}"
        if kind == "m":
            return f"{path}.lora_magnitude_change"
        return f"{path}.lora_{kind.upper()}.{f'{ADAPTER}.' if self.key.kind == 'lora' else ''}weight"

    # -- slots --

    def take(self) -> int:
        """Take a free slot, whose weights, gradients and moments are zero. The number of slots doubles if need be."""
        if not self._free:
            self._grow(max(1, 2 * self.num_slots))
        slot = self._free.pop(0)
        self.num_slots = max(self.num_slots, slot + 1)
        for tensor in vars(self.memory).values():
            tensor[slot].zero_()
        return slot

    def give_back(self, slot: int) -> None:
        self._free = sorted([*self._free, slot])

    @property
    def is_empty(self) -> bool:
        return len(self._free) == len(self.memory.master)

    def _grow(self, num: int) -> None:
        """Memory that has not been written to costs none on a CPU, so a slot does when it is taken."""
        exact = torch.promote_types(self._dtype, torch.float32)
        self._free += range(len(self.memory.master), num)

        def grown(old: Tensor, dtype: torch.dtype) -> Tensor:
            new = torch.empty(num, *old.shape[1:], dtype=dtype, device=self._device)
            new[: self.num_slots].copy_(old[: self.num_slots])
            return new

        self.memory = Memory(*(grown(old, exact) for old in vars(self.memory).values()))
        self._gradient = dict(self._views(self.memory.gradient))
        before, self._compute = self._compute, dict(self._views(self.memory.master))
        if exact != self._dtype:
            self._compute = {p: grown(before.get(p, view), self._dtype) for p, view in self._compute.items()}

    # -- views --

    def _views(self, of: Tensor) -> Iterator[tuple[Piece, Tensor]]:
        for piece in self.placed:
            yield piece, of[:, piece.start : piece.start + prod(piece.shape)].view(-1, *piece.shape)

    def weights(self, piece: Piece) -> Tensor:
        """Return a tensor of all slots, (S, *shape), in the compute dtype."""
        return self._compute[piece]

    def gradients(self, piece: Piece) -> Tensor:
        """View the gradients of a tensor of all slots, (S, *shape)."""
        return self._gradient[piece]

    def named(self, of: Tensor, slot: int) -> Iterator[tuple[str, Tensor]]:
        """Yield the parameters of a slot by name, as views of `of`, one of the tensors of `memory`."""
        for name, (start, shape) in self.pieces.items():
            yield name, of[slot, start : start + prod(shape)].view(shape)

    def refresh(self, slots: slice) -> None:
        """Round the masters of these slots to the weights that products read."""
        self.norms = {key: norm for key, norm in self.norms.items() if not slots.start <= key[1] < slots.stop}
        for piece, view in self._views(self.memory.master):
            if (weights := self._compute[piece]).dtype != view.dtype:
                weights[slots].copy_(view[slots])


def _by_input(paths: Sequence[str], *, apart: bool) -> list[tuple[str, ...]]:
    """Group modules of the same parent that have one input; `apart`: none has."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for path in paths:
        parent, _, name = path.rpartition(".")
        groups.setdefault((path,) if apart else (parent, *input_of(name)), []).append(path)
    return [tuple(group) for group in groups.values()]
