"""What a CUDA graph is, on a CPU: the launches and torch's operations of one run, repeated on the same memory.

As in a graph, whatever Python computed is constant, tensors keep their addresses, and a replay reads nothing else. A
tape keeps no tensor alive: it has addresses, and what a recording makes is in an arena. Before a replay all that is
there is lost, and what was there when the recording began must still be.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from loray_kernels.cuda.launch import Argument, Launcher
from tests.kernels.cuda.memory import Arena, Living, Range, at_address, in_storage
from tests.kernels.cuda.shim import pointers

_FROM_THE_HOST = {"aten::lift_fresh", "aten::lift_fresh_copy", "aten::_pin_memory"}
_READ = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal", "aten::_unique2"}
_SIZED_BY_MASKS = {"aten::index", "aten::index_put", "aten::index_put_", "aten::masked_select"}
_NOT_DISPATCHED = {
    "tolist",
    "numpy",
    "item",
    "cpu",
    "pin_memory",
    "from_numpy",
    "frombuffer",
    "__array__",
    "__dlpack__",
}
_WAITS: list[tuple[Any, str]] = [
    (torch.cuda, "synchronize"),
    *((kind, name) for kind in (torch.cuda.Stream, torch.cuda.Event) for name in ("synchronize", "query")),
]
_NOWHERE = "is neither memory that was there before the recording nor the recording's own"


class TapeLauncher:
    """A launcher whose launches stand on a tape while one is made."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher, self.tape = launcher, Tape(Arena())

    def __call__(self, kernel: str, grid: tuple[int, int, int], threads: int, arguments: Sequence[Argument]) -> None:
        if self.tape.recording:
            for name, address in pointers(kernel, arguments):
                self.tape.use(f"{kernel}: {name}", address, address + 1)
        self._launcher(kernel, grid, threads, arguments)
        if self.tape.recording:
            self.tape.steps.append(lambda: self._launcher(kernel, grid, threads, arguments))


_recording = threading.local()


def is_recording() -> bool:
    """Whether this thread records."""
    return getattr(_recording, "tape", None) is not None


def on_tape(call: Callable[..., object], *arguments: Any) -> None:
    """`call`, which torch does not dispatch, is repeated by replays of what this thread records."""
    tape: Tape | None = getattr(_recording, "tape", None)
    if tape is not None:
        tape.use_tensors("a call", arguments)
        tape.steps.append(partial(call, *tree_map(_by_address, arguments)))


def refuse_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams and events that are waited for, or asked, while this thread records are an AssertionError."""
    for owner, name in _WAITS:
        monkeypatch.setattr(owner, name, partial(_unless_recording, name, getattr(owner, name)))


def _unless_recording(name: str, call: Callable[..., Any], *arguments: Any) -> Any:
    assert not is_recording(), f"{name} while a graph is recorded"
    return call(*arguments)


class _Reads(TorchFunctionMode):
    """What reads a tensor, or makes one of the host's, without an operation that is dispatched."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        assert name not in _NOT_DISPATCHED, f"{name} while a graph is recorded"
        return func(*args, **(kwargs or {}))


class Tape(TorchDispatchMode):
    """AssertionError where a recording takes values from the host, reads results, or waits; where it uses memory that
    it does not own; and where such memory has gone when it is replayed.
    """

    def __init__(self, arena: Arena) -> None:
        super().__init__()
        self.steps: list[Callable[[], object]] = []
        self.recording = False
        self._arena = arena
        self._used: dict[Range, str] = {}  # by whom first
        self._living: Living | None = None

    def record(self, compute: Callable[[], Tensor]) -> Tensor:
        self._living = Living()
        self.recording, _recording.tape = True, self
        try:
            with self, _Reads():
                return compute()
        finally:
            self.recording, _recording.tape = False, None
            self._living = None
            self._arena.spoil()

    def replay(self) -> None:
        for used, by in self._used.items():
            assert used.is_there, f"{by} was there when the step was recorded, and has gone"
        self._arena.spoil()
        for step in self.steps:
            step()

    def use(self, by: str, start: int, stop: int) -> None:
        """`by` uses these addresses. AssertionError unless this recording owns them."""
        if self._arena.has(start):
            owner = self._arena.owner(start, stop)
            assert owner is not None, f"{by} {_NOWHERE}: it has been given up"
            assert owner is self, f"{by} {_NOWHERE}: another recording computes it"
            return
        assert self._living is not None
        found = self._living.find(start, stop)
        assert found is not None, f"{by} {_NOWHERE}"
        assert found.is_there, f"{by} {_NOWHERE}: it has gone meanwhile"
        self._used.setdefault(found, by)

    def use_tensors(self, by: str, arguments: Any) -> None:
        for i, x in enumerate(tree_leaves(arguments)):
            if isinstance(x, Tensor) and (num_bytes := x.untyped_storage().nbytes()):
                start = x.untyped_storage().data_ptr()
                self.use(f"{by}: argument {i}", start, start + num_bytes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._schema.name, kwargs or {}
        assert name not in _FROM_THE_HOST | _READ, f"{name} while a graph is recorded"
        masks = any(isinstance(t, Tensor) and t.dtype is torch.bool for t in tree_leaves(args))
        assert not (masks and name in _SIZED_BY_MASKS), f"{name} with a mask while a graph is recorded"
        assert not kwargs.get("pin_memory"), f"{name} of pinned memory while a graph is recorded"
        self.use_tensors(name, (args, kwargs))
        inputs = {_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        placed = _Placed(self, self._arena, inputs, keeps="empty" not in name)
        out = tree_map(placed, func(*args, **kwargs))
        if (placed.made or func._schema.is_mutable) and placed.keeps:  # views have nothing to repeat
            again = tree_map(_by_address, (args, kwargs))
            self.steps.append(partial(_again, func, *again, [at_address(x) for x in placed.made]))
        return out


class _Placed:
    """Puts results with memory of their own into the arena. `keeps`: with their elements."""

    def __init__(self, owner: Tape, arena: Arena, inputs: set[int], keeps: bool) -> None:
        self._owner, self._arena, self._inputs, self.keeps = owner, arena, inputs, keeps
        self._places: dict[int, torch.UntypedStorage] = {}
        self.made: list[Tensor] = []

    def __call__(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.untyped_storage().nbytes() or _storage(x) in self._inputs:
            return x
        old = x.untyped_storage()
        if _storage(x) not in self._places:
            place = self._places[_storage(x)] = self._arena.storage(old.nbytes(), self._owner)
            if self.keeps:
                place.copy_(old)
            else:
                place.fill_(255)
        self.made.append(in_storage(x, self._places[_storage(x)]))
        return self.made[-1]


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _by_address(x: Any) -> Any:
    return at_address(x) if isinstance(x, Tensor) else x


def _again(func: Any, args: Any, kwargs: Any, made: list[Tensor]) -> None:
    again = [t for t in tree_leaves(func(*args, **kwargs)) if isinstance(t, Tensor)]
    if made:
        for old, new in zip(made, again, strict=True):
            old.copy_(new)
