"""The frozen base in 4 bits while an adapter is trained on it."""

from __future__ import annotations

from typing import Literal

from loray.spec.fields import Frozen

_BLOCK, _OUTER_BLOCK = 64, 256  # bitsandbytes' numbers of elements with a common scale, and of such scales


class QuantizationSpec(Frozen):
    """QLoRA (Dettmers et al., 2023) under bitsandbytes' names: linear layers of the decoder in 4 bits, products in the
    recipe's dtype. Embeddings, norms, the output head and the adapter keep that dtype.
    """

    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    bnb_4bit_use_double_quant: bool = True

    @property
    def bytes_per_element(self) -> float:
        """Four bits, and a scale a block: in fp32, or in 8 bits with an fp32 scale an outer block."""
        scale = 1 + 4 / _OUTER_BLOCK if self.bnb_4bit_use_double_quant else 4
        return 0.5 + scale / _BLOCK
