"""A base of this machine as the teacher of distillation, whole on each worker's device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from loray.bases.registry import BaseModel
from loray.planning.devices import loss_chunks
from loray.spec import DType
from loray.train.data.lessons import TOP, Top
from loray.train.divergence import head_logits
from loray.train.model import load_model
from loray.train.objectives import soft_cap_of


class BaseTeacher:
    """Gives the `num_top` likeliest tokens of a base in `dtype`, with log-probabilities in fp32."""

    def __init__(self, base: BaseModel, dtype: DType, device: torch.device, num_top: int) -> None:
        self._model: Any = load_model(base, dtype=dtype).to(device).eval()
        self._device, self._num_top = device, num_top

    @torch.no_grad()
    def top(self, ids: NDArray[np.int32]) -> Top:
        input_ids_1T = torch.from_numpy(ids[None, :-1].astype(np.int64)).to(self._device)
        hidden_TD = self._model.base_model(input_ids=input_ids_1T, use_cache=False).last_hidden_state[0]
        head_VD = self._model.get_output_embeddings().weight
        found: Top = np.empty((len(hidden_TD), self._num_top), TOP)
        for part in loss_chunks(len(hidden_TD), len(head_VD), self._device.type):
            logits_CV = head_logits(hidden_TD[part], head_VD, soft_cap_of(self._model), torch.float32)
            best = logits_CV.topk(self._num_top)
            found["id"][part] = best.indices.cpu().numpy()
            found["log_prob"][part] = (best.values - logits_CV.logsumexp(1, keepdim=True)).cpu().numpy()
        return found
