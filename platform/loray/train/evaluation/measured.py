"""A model that is measured, and its output head, as one module: FSDP gathers parameters when a module is called.

Shapes: B rows, T positions, D hidden size, V vocabulary; N positions with a label.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from loray.train.data.batches import IGNORED, Batch
from loray.train.evaluation.kept import Figures
from loray.train.mesh import ALONE, Mesh
from loray.train.model import evaluating

Score = Callable[[Tensor, Tensor, Tensor], Figures]  # of (hidden_ND, head_VD, labels_N)


class Measured(nn.Module):
    """`model` is a transformers causal language model. The ranks of a sequence group of `mesh` share each row."""

    def __init__(self, model: Any, mesh: Mesh = ALONE) -> None:
        super().__init__()
        self.model, self._mesh = model, mesh

    @torch.no_grad()
    def figures(self, ids_BT: Tensor, labels_BT: Tensor, score: Score) -> Figures:
        """Figures of this rank's positions with a label. `labels_BT[b, t]` is for the hidden state at t, −100 for none.

        A collective call. The model is as before afterwards.
        """
        num_targets = int((labels_BT != IGNORED).sum())
        batch = Batch(ids_BT, labels_BT, None, None, num_tokens=ids_BT.numel(), num_targets=num_targets)
        with evaluating(self.model), self._mesh.part(batch) as part:
            found: Figures = self(part, score)
        return found

    def forward(self, batch: Batch, score: Score) -> Figures:
        device = next(self.model.parameters()).device
        hidden_BTD = self.model.base_model(**batch.model_inputs(device), use_cache=False).last_hidden_state
        labels_BT = batch.labels_BT.to(device)
        labelled_BT = labels_BT != IGNORED
        head_VD = self.model.get_output_embeddings().weight
        return score(hidden_BTD[labelled_BT], head_VD, labels_BT[labelled_BT])
