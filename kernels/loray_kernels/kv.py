"""How the pool's blocks hold keys and values, and the sequences of a step over them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor


class KvLayout(NamedTuple):
    """A block holds, for each layer, K then V, each (block_tokens, num_kv_heads, head_dim)."""

    num_layers: int
    block_tokens: int
    num_kv_heads: int
    head_dim: int

    @property
    def layer_share(self) -> int:
        return 2 * self.block_tokens * self.num_kv_heads * self.head_dim


@dataclass(frozen=True, slots=True)
class AttentionMeta:
    """The sequences of a step.

    query_start  S+1 offsets into the step's tokens
    context_len  tokens of each sequence in the cache after this step's have been written
    block_table  blocks of each sequence, in order
    slots_T      block × block_tokens + position in it, of each token of the step
    """

    query_start: tuple[int, ...]
    context_len: tuple[int, ...]
    block_table: tuple[Tensor, ...]
    slots_T: Tensor
    memo: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
