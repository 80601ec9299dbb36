"""Dense causal attention over a sequence group: which exchange it uses, and the elements that each rank sends.

Rank r of P holds the tokens [r·L, (r+1)·L) of a row of N = P·L, as with S2-Attn's halo.

ulysses  Jacobs et al., *DeepSpeed Ulysses*, 2023. An all-to-all exchanges tokens for heads: rank r attends over whole
         rows with the query heads [r·H/P, (r+1)·H/P) and the KV heads that serve them. A KV head that serves the query
         heads of several ranks is sent to each of them. It needs a P that divides H.
ring     Liu et al., *Ring Attention*, 2023, for any other P. Keys and values pass from rank to rank. Rank r needs those
         of ranks 0 … r alone, so that the ring is open and the last rank works longest.

Where both are possible it is ulysses, in which all ranks work equally long.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from loray.errors import SpecError

DenseExchange = Literal["ulysses", "ring"]


@dataclass(frozen=True, slots=True)
class DensePlan:
    """num_tokens N, a multiple of num_ranks P (pad rows with `padded_length`); H query and K KV heads.

    Raises SpecError, which is a ValueError, for values that do not fit together. Elements are those of one layer.
    """

    num_tokens: int
    num_ranks: int
    num_heads: int
    num_kv_heads: int

    def __post_init__(self) -> None:
        if self.num_ranks < 1 or self.num_tokens < 1 or self.num_tokens % self.num_ranks:
            raise SpecError(f"{self.num_tokens} tokens do not divide by {self.num_ranks} ranks")
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise SpecError(f"{self.num_heads} query heads do not divide by {self.num_kv_heads} KV heads")

    @property
    def exchange(self) -> DenseExchange:
        return "ring" if self.num_heads % self.num_ranks else "ulysses"

    @property
    def tokens_per_rank(self) -> int:
        """L"""
        return self.num_tokens // self.num_ranks

    @property
    def imbalance(self) -> float:
        """(query, key) pairs of the rank with most of them over the mean of all ranks."""
        if self.exchange == "ulysses":
            return 1.0
        before, own, mean = self.num_tokens - self.tokens_per_rank, self.tokens_per_rank, self.num_tokens / 2
        return (before + own / 2) / mean

    def query_heads(self, rank: int) -> range:
        """Those that `rank` computes with ulysses."""
        share = self.num_heads // self.num_ranks
        return range(rank * share, (rank + 1) * share)

    def kv_heads(self, rank: int) -> range:
        """Those that serve `query_heads(rank)`."""
        heads, repeats = self.query_heads(rank), self.num_heads // self.num_kv_heads
        return range(heads.start // repeats, (heads.stop - 1) // repeats + 1)

    def forward_elements(self, rank: int, head_dim: int, num_rows: int = 1) -> int:
        """Elements that `rank` sends in the forward pass."""
        unit = num_rows * self.tokens_per_rank * head_dim
        if self.exchange == "ring":
            return unit * 2 * self.num_kv_heads * self._passes(rank)
        others = (other for other in range(self.num_ranks) if other != rank)
        return unit * sum(2 * len(self.query_heads(other)) + 2 * len(self.kv_heads(other)) for other in others)

    def backward_elements(self, rank: int, head_dim: int, num_rows: int = 1) -> int:
        """Elements that `rank` sends in the backward pass: a ring passes keys and values once more."""
        unit = num_rows * self.tokens_per_rank * head_dim
        if self.exchange == "ring":
            return unit * 2 * self.num_kv_heads * (self._passes(rank) + rank)
        return unit * (self.num_ranks - 1) * (2 * len(self.query_heads(rank)) + 2 * len(self.kv_heads(rank)))

    def _passes(self, rank: int) -> int:
        """How often `rank` passes keys and values on: its own and those of earlier ranks."""
        return rank + 1 if rank + 1 < self.num_ranks else 0
