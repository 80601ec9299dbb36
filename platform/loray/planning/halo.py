"""The halo of sequence-parallel S2-Attn: which keys and values a rank needs from earlier ranks, and how much that is.

Rank r of P holds the tokens [r·L, (r+1)·L) of a row of N = P·L. Its first queries may belong to a group that starts
further left: the halo of a head half is [start of the group that holds token r·L, r·L). It moves from left to right,
keys and values of the KV heads that serve this half; queries and outputs never move. The backward pass returns as many
gradients from right to left.

One rule covers every L. Where L is a multiple of G/2, a boundary cuts the groups of one half and splits one group of
the other in the middle, so that each boundary carries exactly G·d·h elements: 2 (K and V) · G/2 tokens · h KV heads
of that half · head width d. Elsewhere both halves have a halo, and where it is longer than L it spans several ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from loray.errors import SpecError
from loray.spec import DTYPE_BYTES


class Half(NamedTuple):
    """The plain or the shifted query heads, and the KV heads that serve them.

    Groups are cut at `offset`, `offset` + G, … (and at 0). A KV head that serves query heads of both halves is in both.
    """

    name: Literal["plain", "shifted"]
    offset: int
    query_heads: range
    kv_heads: range


class Span(NamedTuple):
    """Tokens [start, stop), numbered over the whole row, that `rank` holds."""

    rank: int
    start: int
    stop: int

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start


class Halo(NamedTuple):
    """Tokens [start, stop) that `rank` needs from earlier ranks for the queries of one half; empty where equal.

    spans  what each earlier rank supplies, in the order of tokens
    """

    rank: int
    half: Half
    start: int
    stop: int
    spans: tuple[Span, ...]

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start

    @property
    def num_hops(self) -> int:
        """Distance to the furthest supplier: 1 is the left neighbour alone."""
        return self.rank - self.spans[0].rank if self.spans else 0


class Transfer(NamedTuple):
    """Keys and values of `span` for one half, from the rank that holds them to rank `to`."""

    span: Span
    to: int
    half: Half

    def num_elements(self, head_dim: int, num_rows: int = 1) -> int:
        """Keys and values together."""
        return 2 * num_rows * self.span.num_tokens * len(self.half.kv_heads) * head_dim


@dataclass(frozen=True, slots=True)
class HaloPlan:
    """Every halo of one S2-Attn layer over a sequence group.

    num_tokens N, a multiple of num_ranks P (pad rows with `padded_length`); group_size G; H query and K KV heads.
    Raises SpecError, which is a ValueError, for what cannot be.
    """

    num_tokens: int
    num_ranks: int
    group_size: int
    num_heads: int
    num_kv_heads: int

    def __post_init__(self) -> None:
        check_group_size(self.group_size)
        if self.num_ranks < 1 or self.num_tokens < 1:
            raise SpecError(f"{self.num_tokens} tokens over {self.num_ranks} ranks: both must be at least 1")
        if self.num_tokens % self.num_ranks:
            raise SpecError(
                f"{self.num_tokens} tokens do not divide by {self.num_ranks} ranks; "
                f"pad rows to {padded_length(self.num_tokens, self.num_ranks)}"
            )
        if self.num_heads < 1 or self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise SpecError(f"{self.num_heads} query heads do not divide by {self.num_kv_heads} KV heads")

    @property
    def tokens_per_rank(self) -> int:
        """L"""
        return self.num_tokens // self.num_ranks

    @property
    def halves(self) -> tuple[Half, Half]:
        repeats, middle = self.num_heads // self.num_kv_heads, self.num_heads // 2
        plain_kv, shifted_kv = range(-(-middle // repeats)), range(middle // repeats, self.num_kv_heads)
        return (
            Half("plain", 0, range(middle), plain_kv),
            Half("shifted", self.group_size // 2, range(middle, self.num_heads), shifted_kv),
        )

    def halo(self, rank: int, half: Half) -> Halo:
        self._check_rank(rank)
        stop = rank * self.tokens_per_rank
        start = group_start(stop, self.group_size, half.offset) if half.kv_heads else stop  # H = 1 has no plain head
        return Halo(rank, half, start, stop, tuple(self._spans(start, stop)))

    def received(self, rank: int) -> tuple[Transfer, ...]:
        """What `rank` receives in the forward pass; in the backward pass it sends as much in gradients."""
        halos = (self.halo(rank, half) for half in self.halves)
        return tuple(Transfer(span, rank, halo.half) for halo in halos for span in halo.spans)

    def sent(self, rank: int) -> tuple[Transfer, ...]:
        """What `rank` sends in the forward pass; in the backward pass it receives as much in gradients."""
        self._check_rank(rank)
        sent: list[Transfer] = []
        for to in range(rank + 1, min(self.num_ranks, rank + 1 + -(-self.group_size // self.tokens_per_rank))):
            sent += (transfer for transfer in self.received(to) if transfer.span.rank == rank)
        return tuple(sent)

    @property
    def num_hops(self) -> int:
        """The most that any halo spans: at most 1 for L ≥ G, L = G/2 and L = 3G/4; 0 where nothing moves."""
        return max(self.halo(r, half).num_hops for r in range(self.num_ranks) for half in self.halves)

    def elements_received(self, rank: int, head_dim: int, num_rows: int = 1) -> int:
        """Across the boundary between `rank` − 1 and `rank`, one layer, forward."""
        return sum(t.num_elements(head_dim, num_rows) for t in self.received(rank))

    def elements_sent(self, rank: int, head_dim: int, num_rows: int = 1) -> int:
        """By `rank`, one layer, forward."""
        return sum(t.num_elements(head_dim, num_rows) for t in self.sent(rank))

    def bytes_sent(self, rank: int, head_dim: int, dtype: str, num_rows: int = 1) -> int:
        """By `rank`, one layer, forward; `dtype` is a name in DTYPE_BYTES."""
        return self.elements_sent(rank, head_dim, num_rows) * DTYPE_BYTES[dtype]

    def total_elements(self, head_dim: int, num_rows: int = 1) -> int:
        """Over all boundaries, one layer, forward."""
        return sum(self.elements_received(r, head_dim, num_rows) for r in range(self.num_ranks))

    def _spans(self, start: int, stop: int) -> Iterator[Span]:
        length = self.tokens_per_rank
        while start < stop:
            rank = start // length
            end = min(stop, (rank + 1) * length)
            yield Span(rank, start, end)
            start = end

    def _check_rank(self, rank: int) -> None:
        if not 0 <= rank < self.num_ranks:
            raise SpecError(f"there is no rank {rank} in a sequence group of {self.num_ranks}")


def check_group_size(group_size: int) -> None:
    """Raises SpecError."""
    if group_size < 2 or group_size % 2:
        raise SpecError(f"group_size must be even and at least 2, not {group_size}")


def group_start(position: int, group_size: int, offset: int) -> int:
    """First token of the group that holds `position`, where groups are cut at 0 and at offset, offset + G, …"""
    return max(0, position - (position - offset) % group_size)


def padded_length(num_tokens: int, num_ranks: int) -> int:
    """The shortest row that holds `num_tokens` and divides by `num_ranks`."""
    return -(-num_tokens // num_ranks) * num_ranks


def closed_form_elements(group_size: int, num_kv_heads_of_half: int, head_dim: int) -> int:
    """G·d·h: what each boundary carries where L is a multiple of G/2, forward, one layer and row."""
    return group_size * head_dim * num_kv_heads_of_half


def ulysses_elements(num_tokens: int, num_ranks: int, num_heads: int, num_kv_heads: int, head_dim: int) -> int:
    """Sent by one rank, forward, one layer and row, where attention is dense and all-to-all swaps tokens for heads.

    (N/P)(2·h_q + 2·h_kv)·d·(P−1)/P: queries, keys, values and outputs, of which each rank keeps one part in P.
    """
    return num_tokens * (2 * num_heads + 2 * num_kv_heads) * head_dim * (num_ranks - 1) // num_ranks**2


def ring_elements(num_tokens: int, num_ranks: int, num_kv_heads: int, head_dim: int) -> int:
    """Sent by one rank, forward, one layer and row, where attention is dense and keys and values go round a ring.

    2(P−1)(N/P)·h_kv·d
    """
    return 2 * (num_ranks - 1) * num_tokens * num_kv_heads * head_dim // num_ranks
