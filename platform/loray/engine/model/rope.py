"""RoPE: the inverse frequencies, as transformers computes them, and cos and sin of a step's tokens."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from loray.bases.config import ModelConfig
from loray.engine.model.batch import Batch
from loray.errors import IntegrityError
from loray.spec import RopeParameters


class Frequencies(NamedTuple):
    """Inverse frequencies, fp32 (head_dim/2), and the factor of cos and sin (YaRN's attention temperature)."""

    inverse_d: Tensor
    attention_factor: float


def frequencies(rope: RopeParameters, head_dim: int) -> Frequencies:
    """Equal to transformers' bit for bit; its functions compute all scaled kinds."""
    if rope.rope_type == "default":
        exponent_d = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        return Frequencies(1.0 / (rope.rope_theta**exponent_d), 1.0)
    from transformers import LlamaConfig  # takes seconds, and few bases are of a scaled kind
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    # The supported kinds do not use the model's context length; transformers warns if it does not fit.
    context = round((rope.original_max_position_embeddings or 1 << 20) * (rope.factor or 1))
    config = LlamaConfig(
        hidden_size=head_dim,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=head_dim,
        rope_parameters=rope.to_hf(),
        max_position_embeddings=context,
    )
    inverse_d, attention_factor = ROPE_INIT_FUNCTIONS[rope.rope_type](config, torch.device("cpu"))
    return Frequencies(inverse_d, float(attention_factor))


class Rope:
    """cos and sin of each token with the parameters of its model: the base's, or its LongLoRA adapter's."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        self._config = config
        self._dtype, self._device = dtype, device
        self._known: dict[RopeParameters, Frequencies] = {}

    def prepare(self, rope: RopeParameters) -> None:
        """Compute the frequencies of an adapter before a step needs them. May be called from any thread.

        Raises IntegrityError where they cannot be computed or are not finite.
        """
        try:
            inverse_d, factor = self._frequencies(rope)
        except Exception as e:
            raise IntegrityError(f"its RoPE parameters {rope.to_hf()} cannot be computed: {e!r}") from e
        if not (inverse_d.isfinite().all() and math.isfinite(factor)):
            raise IntegrityError(f"its RoPE parameters {rope.to_hf()} give frequencies that are not finite")

    def numbers(self, rope: RopeParameters) -> npt.NDArray[np.float32]:
        """Inverse frequencies and the factor of cos and sin, (head_dim/2 + 1,), for an adapter's record."""
        inverse_d, factor = self._frequencies(rope)
        return np.append(inverse_d.float().cpu().numpy(), np.float32(factor))

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        positions_T = batch.positions_T.float()
        if (vectors := batch.own_vectors) is None:
            angles_Th, factor_T = self._angles(positions_T, self._config.rope)
        else:
            inverse_Th, factor_T = vectors.rope(*self._frequencies(self._config.rope))
            angles_Th = positions_T.unsqueeze(1) * inverse_Th
        for slot in batch.adapters.slots:
            if slot.adapter.rope is not None:
                own = slice(slot.start, slot.stop)
                angles_Th[own], factor_T[own] = self._angles(positions_T[own], slot.adapter.rope)
        factor_T1 = factor_T.unsqueeze(1)
        cos_Th, sin_Th = ((f(angles_Th) * factor_T1).to(self._dtype) for f in (torch.cos, torch.sin))
        return torch.cat((cos_Th, cos_Th), dim=-1), torch.cat((sin_Th, sin_Th), dim=-1)

    def _angles(self, positions_T: Tensor, rope: RopeParameters) -> tuple[Tensor, Tensor]:
        inverse_d, factor = self._frequencies(rope)
        return torch.outer(positions_T, inverse_d), torch.full_like(positions_T, factor)

    def _frequencies(self, rope: RopeParameters) -> Frequencies:
        found = self._known.get(rope)
        if found is None:
            inverse_d, factor = frequencies(rope, self._config.head_dim)
            found = self._known[rope] = Frequencies(inverse_d.to(self._device), factor)
        return found
