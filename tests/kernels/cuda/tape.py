"""What a CUDA graph is, on a CPU: the launches and torch's operations of one run, repeated on the same memory.

As in a graph, whatever Python computed is constant, tensors keep their addresses, and a replay reads nothing else.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from loray_kernels.cuda.launch import Argument, Launcher

_FROM_THE_HOST = {"aten::lift_fresh", "aten::lift_fresh_copy"}
_READ = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero"}


class TapeLauncher:
    """A launcher whose launches stand on a tape while one is made."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher, self.tape = launcher, Tape()

    def __call__(self, kernel: str, grid: tuple[int, int, int], threads: int, arguments: Sequence[Argument]) -> None:
        self._launcher(kernel, grid, threads, arguments)
        if self.tape.recording:
            self.tape.steps.append(lambda: self._launcher(kernel, grid, threads, arguments))


_recording = threading.local()


def on_tape(call: Callable[[], object]) -> None:
    """`call`, which torch does not dispatch, is repeated by replays of what this thread records."""
    if (tape := getattr(_recording, "tape", None)) is not None:
        tape.steps.append(call)


class Tape(TorchDispatchMode):
    """AssertionError where a recording takes values from the host, or reads results."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Callable[[], object]] = []
        self.recording = False
        self._kept: list[Any] = []  # a graph owns the memory of its intermediates

    def record(self, compute: Callable[[], Tensor]) -> Tensor:
        self.recording, _recording.tape = True, self
        try:
            with self:
                return compute()
        finally:
            self.recording, _recording.tape = False, None

    def replay(self) -> None:
        for step in self.steps:
            step()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._schema.name, kwargs or {}
        assert name not in _FROM_THE_HOST | _READ, f"{name} while a graph is recorded"
        out = func(*args, **kwargs)
        self._kept.append((args, kwargs, out))
        inputs = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in inputs]
        if (made or func._schema.is_mutable) and "empty" not in name:  # views have nothing to repeat
            self.steps.append(lambda: self._again(func, args, kwargs, made))
        return out

    @staticmethod
    def _again(func: Any, args: Any, kwargs: Any, made: list[Tensor]) -> None:
        again = [t for t in tree_leaves(func(*args, **kwargs)) if isinstance(t, Tensor)]
        if made:
            for old, new in zip(made, again, strict=True):
                old.copy_(new)
