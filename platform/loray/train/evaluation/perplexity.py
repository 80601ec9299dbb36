"""Dense perplexity of windows, and figures that are kept for another run.

As in the evaluation of LongLoRA (Chen et al., ICLR 2024), it is exp of the mean loss over whole windows. Every window
is computed alone, from its first token on, so that its early tokens have little context. All values follow this rule,
and are comparable. A window takes one pass without a KV cache: attention is dense and causal, without a T × T mask, and
the output head computes a chunk of positions at a time.

Shapes: B rows or windows, T positions or tokens of a window, N positions with a label, D hidden size, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from loray.errors import EvaluationError
from loray.files import canonical_json, replacing, touch
from loray.planning.memory import MEASURED_AT_ONCE
from loray.telemetry import StageProgress, get_logger
from loray.train.data.batches import IGNORED, TrainBatch
from loray.train.mesh import ALONE, Mesh
from loray.train.model import evaluating
from loray.train.objectives import LabelledStates, labelled_states

log = get_logger(__name__)

_FOLDER = Path("cache") / "evaluations"
_FORMAT = 3  # to be raised where the same pass means another figure than before
_UNUSED_S = 30 * 24 * 3600.0

Figures = Mapping[str, float]  # sums over the tokens of a pass, of which each rank of a sequence group has its part


class Pass(NamedTuple):
    """`key`: a digest of all that goes into the model. `num_items`: windows or prompts in the pass. `name`: what its
    figures are, for an error.
    """

    key: str
    num_items: int
    name: str


Take = Callable[[Sequence[Pass], Callable[[int], Figures]], list[Figures]]  # (passes, figures of the i-th)


def finite(value: float, what: str) -> float:
    """Return `value`. Raises EvaluationError where it is not finite."""
    if not isfinite(value):
        raise EvaluationError(f"{what} is {value}: measure in float32, or look at the weights")
    return value


def digest(*inputs: str | Sequence[int] | NDArray[np.int32]) -> str:
    """Compute the SHA-256 of texts and token ids in order, with their shapes."""
    found = hashlib.sha256()
    for data in inputs:
        array = np.frombuffer(data.encode(), np.uint8) if isinstance(data, str) else np.asarray(data, "<i4")
        found.update(f"{array.dtype} {array.shape} ".encode())
        found.update(array.tobytes())
    return found.hexdigest()


class KeptFigures:
    """Figures of passes, kept on disk as they are computed: an evaluation that was interrupted goes on where it was.

    A model has a folder, named by a digest of what decides its figures, with a file of JSON for each pass, named by a
    digest of its tokens. Floats are read as they were written, to the last bit. Files that were not used for 30 days
    are removed.

    Where several ranks measure, each sequence group computes passes of its own, and rank 0 keeps what all have
    computed. `num_taken` and `num_computed` count windows and prompts, of all models.

    home    None: nothing is kept
    fresh   nothing is taken; what is computed replaces what was kept
    mesh    the ranks that measure, which all make the same calls; `device` is this rank's
    """

    def __init__(
        self,
        home: Path | None = None,
        *,
        fresh: bool = False,
        mesh: Mesh = ALONE,
        device: torch.device | None = None,
    ) -> None:
        self._folder = None if home is None or mesh.world.rank else home / _FOLDER
        self._fresh, self._mesh, self._device = fresh, mesh, device or torch.device("cpu")
        self.num_taken = self.num_computed = 0
        if self._folder is not None:
            _remove_unused(self._folder)

    def figures(
        self,
        model: Mapping[str, Any],
        passes: Sequence[Pass],
        compute: Callable[[int], Figures],
        progress: StageProgress = lambda share: None,
    ) -> list[Figures]:
        """Find the figures of each pass, in order; `compute(i)` gives those of passes[i] where no earlier run has.

        `model` is what decides the figures beside the passes, as JSON. Progress begins with the share that is taken.
        Every rank calls `compute` equally often: one that has no pass repeats another's, which does not count. Raises
        EvaluationError, on all ranks, where a figure is not finite.
        """
        name = digest(canonical_json({"format": _FORMAT, **model}))
        folder = None if self._folder is None else self._folder / name
        known = self._known(folder, passes)
        total = sum(p.num_items for p in passes)
        done = sum(p.num_items for p in passes if p.key in known)
        self.num_taken += done
        progress(done / total)
        missing = list({p.key: i for i, p in enumerate(passes) if p.key not in known}.values())
        for first in range(0, len(missing), self._mesh.data_size):
            together = missing[first : first + self._mesh.data_size]
            for i, figures in zip(together, self._compute(together, compute), strict=True):
                key, num_items, name = passes[i]
                known[key] = {figure: finite(value, name) for figure, value in figures.items()}
                if folder is not None:
                    _keep(folder / f"{key}.json", known[key])
                done += num_items
                self.num_computed += num_items
                progress(done / total)
        return [known[p.key] for p in passes]

    def _known(self, folder: Path | None, passes: Sequence[Pass]) -> dict[str, Figures]:
        """Tell all ranks what rank 0 has kept of `passes`."""
        found: dict[str, Figures] = {}
        if folder is not None and not self._fresh:
            for key in {p.key for p in passes}:
                with suppress(OSError, ValueError):
                    path = folder / f"{key}.json"
                    found[key] = json.loads(path.read_bytes())
                    touch(path)
        (known, *_) = self._mesh.world.gather(json.dumps(found))
        return dict(json.loads(known or "{}"))

    def _compute(self, together: list[int], compute: Callable[[int], Figures]) -> list[Figures]:
        """The figures of passes, at most one for each sequence group, summed over the ranks of the group."""
        data_rank = self._mesh.data_rank
        mine = compute(together[min(data_rank, len(together) - 1)])
        names = sorted(mine)
        sums = [mine[name] if i == data_rank else 0.0 for i in range(len(together)) for name in names]
        sums = self._mesh.world.sum(*sums, device=self._device)
        return [dict(zip(names, sums[i * len(names) :], strict=False)) for i in range(len(together))]


def _keep(path: Path, figures: Figures) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as f:
            f.write(json.dumps(figures).encode())
    except OSError as e:
        log.warning("a figure is not kept, and is computed again after an interruption: %s", e)


def _remove_unused(folder: Path) -> None:
    for path in folder.glob("*/*.json"):
        with suppress(OSError):  # another process removes it too
            if time.time() - path.stat().st_mtime > _UNUSED_S:
                path.unlink()


def take_all(passes: Sequence[Pass], compute: Callable[[int], Figures]) -> list[Figures]:
    """Compute the figures of each pass, and keep nothing."""
    return KeptFigures().figures({}, passes, compute)


Score = Callable[[LabelledStates], Figures]


class Measured(nn.Module):
    """A transformers causal language model and its output head, as one module: FSDP gathers parameters at its call.

    The ranks of a sequence group of `mesh` share each row.
    """

    def __init__(self, model: Any, mesh: Mesh = ALONE) -> None:
        super().__init__()
        self.model, self._mesh = model, mesh

    @torch.no_grad()
    def figures(self, ids_BT: Tensor, labels_BT: Tensor, score: Score) -> Figures:
        """Compute figures of this rank's positions with a label. `labels_BT[b, t]` is for the hidden state at t, −100
        for none.

        A collective call. The model is as before afterwards.
        """
        num_targets = int((labels_BT != IGNORED).sum())
        batch = TrainBatch(ids_BT, labels_BT, None, None, num_tokens=ids_BT.numel(), num_targets=num_targets)
        with evaluating(self.model), self._mesh.part(batch) as part:
            found: Figures = self(part, score)
        return found

    def forward(self, batch: TrainBatch, score: Score) -> Figures:
        return score(labelled_states(self.model, batch))


def mean_loss(model: Callable[[], Measured], windows_T: Sequence[NDArray[np.int32]], take: Take = take_all) -> float:
    """Compute the mean loss in nats over the T − 1 predicted tokens of all windows of T tokens: the logarithm of
    perplexity.

    `model` is called for passes alone whose figures `take` does not have. Raises EvaluationError where a loss is not
    finite.
    """
    num_windows, context_length = len(windows_T), len(windows_T[0])
    rows = max(1, MEASURED_AT_ONCE // context_length)  # short windows share a pass
    batches_BT = [np.stack(windows_T[start : start + rows]) for start in range(0, num_windows, rows)]
    name = f"the loss on windows of {context_length:,} tokens"
    passes = [Pass(digest("perplexity", ids_BT), len(ids_BT), name) for ids_BT in batches_BT]

    def compute(i: int) -> Figures:
        ids_BT = torch.from_numpy(batches_BT[i].astype(np.int64))
        return model().figures(ids_BT, F.pad(ids_BT[:, 1:], (0, 1), value=IGNORED), _summed)

    figures = take(passes, compute)
    return sum(f["nll"] for f in figures) / sum(f["num_tokens"] for f in figures)


def _summed(states: LabelledStates) -> Figures:
    return {"nll": float(states.losses().sum()), "num_tokens": float(len(states.labels_N))}
