"""Training: the loop, data, S2-Attn, checkpoints and evaluation. Plain Python and torch, without Ray."""

from loray.train.attention.attend import s2_attention

__all__ = ["s2_attention"]
