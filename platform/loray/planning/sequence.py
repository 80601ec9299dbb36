"""Plans of a sequence group: the tokens and heads that each rank sends.

Rank r of P holds the tokens [r·L, (r+1)·L) of a row of N = P·L.

With S2-Attn its first queries may belong to a group that starts on an earlier rank: the halo of a head half is [start
of the group that holds token r·L, r·L). The forward pass sends the keys and values of these tokens, for the KV heads
that serve this half, to rank r; queries and outputs stay. The backward pass sends as many gradients back. Where L is a
multiple of G/2, a boundary between ranks is a group cut of one half and the middle of a group of the other, so that
exactly G·d·h elements cross it: 2 (K and V) · G/2 tokens · h KV heads of the latter half · head width d. For other L
both halves have a halo. A halo that is longer than L comes from several ranks.

Dense attention exchanges tokens for heads, Ulysses (Jacobs et al., *DeepSpeed Ulysses*, 2023): an all-to-all gathers
whole rows of some query heads on each rank, with the KV heads that serve them. A KV head that serves the query heads of
several ranks is sent to each of them. Ranks have equally many query heads where P divides H; else some have one more,
and with more ranks than heads the others have none: the rank with most heads holds ⌈H/P⌉ whole rows of queries and
outputs, and works ⌈H/P⌉·P/H times as long as the mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from loray.errors import SpecError


class Half(NamedTuple):
    """The plain or the shifted query heads, and the KV heads that serve them.

    Groups are cut at 0, `offset`, `offset` + G, …. A KV head that serves query heads of both halves is in both.
    """

    name: Literal["plain", "shifted"]
    offset: int
    query_heads: range
    kv_heads: range

    def num_elements(self, num_tokens: int, head_dim: int) -> int:
        """Count the elements of the keys and values of some tokens together."""
        return 2 * num_tokens * len(self.kv_heads) * head_dim


class Span(NamedTuple):
    """Tokens [start, stop) of the whole row, all held by `rank`."""

    rank: int
    start: int
    stop: int


class Halo(NamedTuple):
    """Tokens [start, stop) that `rank` needs from earlier ranks for the queries of one half; empty where equal."""

    rank: int
    half: Half
    start: int
    stop: int
    tokens_per_rank: int

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start

    @property
    def num_hops(self) -> int:
        """Distance to the earliest rank that holds a part of it: 1 for the previous rank."""
        return self.rank - self.start // self.tokens_per_rank if self.num_tokens else 0

    @property
    def spans(self) -> tuple[Span, ...]:
        """The tokens that each earlier rank holds, in order."""
        length = self.tokens_per_rank
        holders = range(self.rank - self.num_hops, self.rank)
        return tuple(Span(r, max(self.start, r * length), (r + 1) * length) for r in holders)


class HaloMessage(NamedTuple):
    """Keys and values of `span` for one half, from the rank that holds them to rank `to`."""

    span: Span
    to: int
    half: Half


@dataclass(frozen=True, slots=True)
class HaloPlan:
    """Every halo of one S2-Attn layer over a sequence group.

    num_tokens N, a multiple of num_ranks P (pad rows with `padded_length`); group_size G; H query and K KV heads.
    Raises SpecError, which is a ValueError, for values that do not fit together.
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
        """L, the tokens of a row that a rank holds."""
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
        start = group_start(stop, self.group_size, half.offset) if half.kv_heads else stop  # no plain head for H = 1
        return Halo(rank, half, start, stop, self.tokens_per_rank)

    def received(self, rank: int) -> tuple[HaloMessage, ...]:
        """List the messages to `rank` in the forward pass. The backward pass sends gradients of the same sizes back."""
        halos = (self.halo(rank, half) for half in self.halves)
        return tuple(HaloMessage(span, rank, halo.half) for halo in halos for span in halo.spans)

    def sent(self, rank: int) -> tuple[HaloMessage, ...]:
        """List the messages from `rank` in the forward pass."""
        messages = (message for to in self._receivers(rank) for message in self.received(to))
        return tuple(message for message in messages if message.span.rank == rank)

    @property
    def num_hops(self) -> int:
        """The largest `num_hops` of any halo: at most 1 for L ≥ G, L = G/2 and L = 3G/4; 0 without a halo."""
        return max(self.halo(r, half).num_hops for r in range(self.num_ranks) for half in self.halves)

    def elements_received(self, rank: int, head_dim: int, num_rows: int = 1) -> int:
        """Count the elements that `rank` receives in one layer's forward pass."""
        halos = (self.halo(rank, half) for half in self.halves)
        return num_rows * sum(halo.half.num_elements(halo.num_tokens, head_dim) for halo in halos)

    def elements_sent(self, rank: int, head_dim: int, num_rows: int = 1) -> int:
        """Count the elements that `rank` sends in one layer's forward pass."""
        start, stop = rank * self.tokens_per_rank, (rank + 1) * self.tokens_per_rank
        halos = (self.halo(to, half) for to in self._receivers(rank) for half in self.halves)
        held = ((halo.half, max(0, stop - max(start, halo.start))) for halo in halos)  # of what they need
        return num_rows * sum(half.num_elements(num_tokens, head_dim) for half, num_tokens in held)

    def _receivers(self, rank: int) -> range:
        """The ranks that may need tokens of this one: those within a group's length after it."""
        self._check_rank(rank)
        return range(rank + 1, min(self.num_ranks, rank + 1 + -(-self.group_size // self.tokens_per_rank)))

    def _check_rank(self, rank: int) -> None:
        if not 0 <= rank < self.num_ranks:
            raise SpecError(f"there is no rank {rank} in a sequence group of {self.num_ranks}")


def check_group_size(group_size: int) -> None:
    """Raise SpecError unless `group_size` is even and at least 2."""
    if group_size < 2 or group_size % 2:
        raise SpecError(f"group_size must be even and at least 2, not {group_size}")


def group_start(position: int, group_size: int, offset: int) -> int:
    """Find the first token of the group that holds `position`. Groups are cut at 0, offset, offset + G, …."""
    return max(0, position - (position - offset) % group_size)


def padded_length(num_tokens: int, num_ranks: int) -> int:
    """Compute the least multiple of `num_ranks` that is at least `num_tokens`."""
    return -(-num_tokens // num_ranks) * num_ranks


def ulysses_elements(num_tokens: int, num_ranks: int, num_heads: int, num_kv_heads: int, head_dim: int) -> int:
    """Count the elements that one rank sends per row in one layer's forward pass of dense attention with Ulysses'
    all-to-all.

    (N/P)(2·h_q + 2·h_kv)·d·(P−1)/P: queries, keys, values and outputs, of which each rank keeps one part in P.
    """
    return num_tokens * (2 * num_heads + 2 * num_kv_heads) * head_dim * (num_ranks - 1) // num_ranks**2


def ring_elements(num_tokens: int, num_ranks: int, num_kv_heads: int, head_dim: int) -> int:
    """Count the elements that one rank sends per row in one layer's forward pass of dense ring attention.

    2(P−1)(N/P)·h_kv·d: keys and values pass through all ranks.
    """
    return 2 * (num_ranks - 1) * num_tokens * num_kv_heads * head_dim // num_ranks


@dataclass(frozen=True, slots=True)
class DensePlan:
    """The exchange of one dense layer over a sequence group.

    num_tokens N, a multiple of num_ranks P (pad rows with `padded_length`); H query and K KV heads. Raises SpecError,
    which is a ValueError, for values that do not fit together. Elements are those of one layer.
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
    def tokens_per_rank(self) -> int:
        """L, the tokens of a row that a rank holds."""
        return self.num_tokens // self.num_ranks

    @property
    def most_heads(self) -> int:
        """The query heads of the rank with most of them."""
        return -(-self.num_heads // self.num_ranks)

    @property
    def imbalance(self) -> float:
        """Query heads of the rank with most of them over the mean of all ranks."""
        return self.most_heads * self.num_ranks / self.num_heads

    def query_heads(self, rank: int) -> range:
        """List the query heads that `rank` computes."""
        return range(rank * self.num_heads // self.num_ranks, (rank + 1) * self.num_heads // self.num_ranks)

    def kv_heads(self, rank: int) -> range:
        """List the KV heads that serve `query_heads(rank)`."""
        heads, repeats = self.query_heads(rank), self.num_heads // self.num_kv_heads
        return range(heads.start // repeats, (heads.stop - 1) // repeats + 1) if heads else range(0)

    def forward_elements(self, rank: int, head_dim: int, num_rows: int = 1) -> int:
        """Count the elements that `rank` sends in the forward pass: others' queries, keys and values, own outputs."""
        others = (other for other in range(self.num_ranks) if other != rank)
        sent = sum(len(self.query_heads(other)) + 2 * len(self.kv_heads(other)) for other in others)
        returned = (self.num_ranks - 1) * len(self.query_heads(rank))
        return num_rows * self.tokens_per_rank * head_dim * (sent + returned)

    def backward_elements(self, rank: int, head_dim: int, num_rows: int = 1) -> int:
        """Count the elements that `rank` sends in the backward pass: gradients of what it got, and of outputs."""
        sent = (self.num_ranks - 1) * (len(self.query_heads(rank)) + 2 * len(self.kv_heads(rank)))
        returned = self.num_heads - len(self.query_heads(rank))
        return num_rows * self.tokens_per_rank * head_dim * (sent + returned)
