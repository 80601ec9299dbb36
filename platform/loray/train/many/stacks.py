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
    """Five tensors (S, P): the weights as the model's products read them, and what an optimizer holds of them.

    An fp32 base has `compute` and `master` in one. Rows of free slots hold anything.
    """

    compute: Tensor
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
        self._dtype, self._device = dtype, device
        self._free: list[int] = []
        self.num_slots = 0  # which have been used
        self.paths = tuple(linears)
        self.inputs: dict[str, Inputs] = {}
        self.pieces: dict[str, Piece] = {}  # by name of the parameter
        self.parameters: list[Parameters] = []
        self._size = 0
        self._lay_out(linears)
        self.memory = Memory(*(torch.empty(0, self._size) for _ in fields(Memory)))
        self._views: dict[tuple[str, Piece], Tensor] = {}

    def _lay_out(self, linears: Mapping[str, tuple[int, int]]) -> None:
        """Place one kind of parameter after the other, so that each is one range of numbers."""
        key, groups = self.key, _by_input(list(linears), apart=self.key.dropout > 0)
        begin = self._size
        for paths in groups:
            width = linears[paths[0]][1]
            if key.kind == "vera":
                inputs = Inputs(paths, None)
            else:
                inputs = Inputs(paths, self._place((key.rank * len(paths), width)))
            self.inputs |= dict.fromkeys(paths, inputs)
            if (a := inputs.a) is not None:
                for i, path in enumerate(paths):
                    start = a.start + i * key.rank * width
                    self.pieces[self.name(path, "a")] = Piece(start, (key.rank, width))
        kinds = {"lora": "b", "dora": "bm", "vera": "db"}[key.kind]
        if key.kind != "vera":
            self.parameters.append(Parameters(self.name(self.paths[0], "a"), slice(begin, self._size)))
        for kind in kinds:
            begin = self._size
            for path, (out, _) in linears.items():
                shape = {"d": (key.rank,), "m": (out,)}.get(kind, (out,) if key.kind == "vera" else (out, key.rank))
                self.pieces[self.name(path, kind)] = self._place(shape)
            self.parameters.append(Parameters(self.name(self.paths[0], kind), slice(begin, self._size)))

    def _place(self, shape: tuple[int, ...]) -> Piece:
        start = self._size
        self._size += -(-prod(shape) // _ALIGNMENT) * _ALIGNMENT
        return Piece(start, shape)

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
        for tensor in self.tensors():
            tensor[slot].zero_()
        return slot

    def give_back(self, slot: int) -> None:
        self._free = sorted([*self._free, slot])

    @property
    def is_empty(self) -> bool:
        return len(self._free) == len(self.memory.master)

    def tensors(self) -> list[Tensor]:
        """List the tensors of `memory`, each once."""
        return list({id(t): t for t in vars(self.memory).values()}.values())

    def _grow(self, num: int) -> None:
        """Memory that has not been written to costs none on a CPU, so a slot does when it is taken."""
        before, self._views = self.memory, {}
        exact = torch.promote_types(self._dtype, torch.float32)
        self._free += range(len(before.master), num)

        def grown(old: Tensor, dtype: torch.dtype) -> Tensor:
            new = torch.empty(num, self._size, dtype=dtype, device=self._device)
            new[: self.num_slots].copy_(old[: self.num_slots])
            return new

        master = grown(before.master, exact)
        compute = master if exact == self._dtype else grown(before.compute, self._dtype)
        rest = [grown(old, exact) for old in (before.gradient, before.exp_avg, before.exp_avg_sq)]
        self.memory = Memory(compute, master, *rest)

    # -- views --

    def stack(self, piece: Piece, of: Literal["compute", "gradient"]) -> Tensor:
        """View a tensor of all slots: (S, *shape)."""
        view = self._views.get((of, piece))
        if view is None:
            memory: Tensor = getattr(self.memory, of)
            end = piece.start + prod(piece.shape)
            view = memory[:, piece.start : end].view(-1, *piece.shape)
            self._views[of, piece] = view
        return view

    def named(self, of: Tensor, slot: int) -> Iterator[tuple[str, Tensor]]:
        """Yield the parameters of a slot by name, as views of `of`, one of the tensors of `memory`."""
        for name, (start, shape) in self.pieces.items():
            yield name, of[slot, start : start + prod(shape)].view(shape)


def _by_input(paths: Sequence[str], *, apart: bool) -> list[tuple[str, ...]]:
    """Group modules of the same parent that have one input; `apart`: none has."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for path in paths:
        parent, _, name = path.rpartition(".")
        groups.setdefault((path,) if apart else (parent, *input_of(name)), []).append(path)
    return [tuple(group) for group in groups.values()]
