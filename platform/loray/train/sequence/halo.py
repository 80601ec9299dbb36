"""S2-Attn over ranks by a halo of keys and values.

    exchange = HaloExchange(plan, group)
    k, v, token = exchange.start(k, v)     # posts the messages
    …                                      # attention that needs no halo
    halos = exchange.finish(token)         # waits for the messages
    …                                      # attention over halos
    out = bind(out, halos)

In the backward pass, `bind` makes autograd visit every exchange, `finish` posts the gradients of the halos, and `start`
waits for the gradients of the keys and values that this rank sent. Attention that needs no halo is between them. Local
keys and values pass through `start`, and the output through `bind`, so that every rank takes part in the exchange:
also a rank without a halo, with a halo of another document, or with padding alone.

Shapes: B rows, H query heads, K key-value heads of the model and K' of a half, N positions of a whole row, L of this
rank, h of a halo, R = h + L of both, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from loray.planning.sequence import Half, HaloPlan, check_group_size, group_start
from loray.train.attention.attend import attend_heads
from loray.train.attention.segments import AttentionSegments, find_segments
from loray.train.sequence.shard import Pending, SequenceGroup, post


class KeysValues(NamedTuple):
    """Keys and values, (B, K, tokens, D) each."""

    k: Tensor
    v: Tensor


class Halos(NamedTuple):
    """Keys and values before those of this rank, (B, K', h, D) each. h = 0 where a half has no halo."""

    plain: KeysValues
    shifted: KeysValues

    def detach(self) -> Halos:
        plain, shifted = (KeysValues(half.k.detach(), half.v.detach()) for half in self)
        return Halos(plain, shifted)


class _Piece(NamedTuple):
    """Part of a message: the keys, then the values, of some heads and tokens of a half, 0 (plain) or 1 (shifted).

    Slices index the rank's own keys in a sent message, and the halo of this half in a received one.
    """

    half: int
    heads: slice
    tokens: slice


_Messages = dict[int, list[_Piece]]  # at most one per peer


class _Routes(NamedTuple):
    sent: _Messages
    received: _Messages


@lru_cache
def _routes(plan: HaloPlan, rank: int) -> _Routes:
    """Sender and receiver list the pieces of a message in the same order: plain, then shifted."""
    routes, own = _Routes({}, {}), rank * plan.tokens_per_rank
    for span, to, half in plan.sent(rank):
        heads = slice(half.kv_heads.start, half.kv_heads.stop)
        piece = _Piece(plan.halves.index(half), heads, slice(span.start - own, span.stop - own))
        routes.sent.setdefault(to, []).append(piece)
    for index, half in enumerate(plan.halves):
        halo = plan.halo(rank, half)
        for span in halo.spans:
            piece = _Piece(index, slice(0, len(half.kv_heads)), slice(span.start - halo.start, span.stop - halo.start))
            routes.received.setdefault(span.rank, []).append(piece)
    return routes


class HaloExchange:
    """The exchange of one layer in one forward pass and its backward pass.

    `kept` are halos of an earlier forward pass of this layer over the same batch. With them, this forward pass sends
    nothing.
    """

    def __init__(self, plan: HaloPlan, group: SequenceGroup, kept: Halos | None = None) -> None:
        self._plan, self._group, self._halos, self._is_kept = plan, group, kept, kept is not None
        self._routes = _routes(plan, group.rank)
        self._pending = Pending([], [])
        self._arriving: dict[int, Tensor] = {}

    def start(self, k_BKLD: Tensor, v_BKLD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Post the messages. Returns keys and values for the rest of the layer, and a token for `finish`."""
        k_BKLD, v_BKLD, token = _Start.apply(k_BKLD, v_BKLD, self)  # type: ignore[no-untyped-call]
        return k_BKLD, v_BKLD, token

    def finish(self, token: Tensor) -> Halos:
        k_plain, v_plain, k_shifted, v_shifted = _Finish.apply(token, self)  # type: ignore[no-untyped-call]
        return Halos(KeysValues(k_plain, v_plain), KeysValues(k_shifted, v_shifted))

    # Autograd calls these four, in this order.

    def send_keys_values(self, own: KeysValues) -> None:
        if self._is_kept:
            return
        num_rows, _, _, width = own.k.shape
        plain, shifted = (
            own.k.new_empty(2, num_rows, len(half.kv_heads), self._plan.halo(self._group.rank, half).num_tokens, width)
            for half in self._plan.halves
        )
        self._halos = Halos(KeysValues(*plain), KeysValues(*shifted))
        self._group.traffic.forward_bytes += self._post(self._routes.sent, Halos(own, own), self._routes.received)

    def receive_halos(self) -> Halos:
        halos, self._halos = self._halos, None
        assert halos is not None
        if not self._is_kept:
            for place, part in self._arrived(self._routes.received, halos):
                place.copy_(part)
        return halos

    def send_gradients(self, gradients: Halos) -> None:
        self._group.traffic.backward_bytes += self._post(self._routes.received, gradients, self._routes.sent)

    def add_gradients(self, own: KeysValues) -> KeysValues:
        """Add to `own`, the gradients of local keys and values, those that later ranks sent back."""
        if self._routes.sent:
            own = KeysValues(*(x.clone() for x in own))  # autograd may use these tensors elsewhere
        for place, part in self._arrived(self._routes.sent, Halos(own, own)):
            place.add_(part)
        return own

    def _post(self, sent: _Messages, source: Halos, received: _Messages) -> int:
        """Post the messages. Returns the number of bytes sent."""
        like, (num_rows, _, _, width) = source.plain.k, source.plain.k.shape
        outgoing = {
            peer: torch.cat([x[:, p.heads, p.tokens].reshape(-1) for p in pieces for x in source[p.half]])
            for peer, pieces in sent.items()
        }
        self._arriving = {
            peer: like.new_empty(2 * num_rows * width * sum(_length(p.heads) * _length(p.tokens) for p in pieces))
            for peer, pieces in received.items()
        }
        self._pending = post(self._group, outgoing, self._arriving)
        return sum(x.nbytes for x in outgoing.values())

    def _arrived(self, received: _Messages, target: Halos) -> Iterator[tuple[Tensor, Tensor]]:
        """Wait for all messages. Yields (place in `target`, received values) for each part of them."""
        self._pending.wait()
        for peer, pieces in received.items():
            message = self._arriving.pop(peer)
            for piece in pieces:
                for x in target[piece.half]:
                    place = x[:, piece.heads, piece.tokens]
                    part, message = message[: place.numel()], message[place.numel() :]
                    yield place, part.view(place.shape)


def _length(part: slice) -> int:
    return int(part.stop - part.start)


def bind(out: Tensor, halos: Halos) -> Tensor:
    """Make `out` depend on every halo for autograd, so that no rank's backward pass omits an exchange."""
    bound: Tensor = _Bind.apply(out, *halos.plain, *halos.shifted)  # type: ignore[no-untyped-call]
    return bound


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, k_BKLD: Tensor, v_BKLD: Tensor, exchange: HaloExchange) -> tuple[Tensor, Tensor, Tensor]:
        ctx.exchange = exchange
        exchange.send_keys_values(KeysValues(k_BKLD, v_BKLD))
        return k_BKLD.view_as(k_BKLD), v_BKLD.view_as(v_BKLD), k_BKLD.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        dk_BKLD, dv_BKLD, _ = grads
        return (*ctx.exchange.add_gradients(KeysValues(dk_BKLD, dv_BKLD)), None)


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, exchange: HaloExchange) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        plain, shifted = exchange.receive_halos()
        return (*plain, *shifted)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.exchange.send_gradients(Halos(KeysValues(*grads[:2]), KeysValues(*grads[2:])))
        return grads[0].new_empty(0), None


class _Bind(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, *halos: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (grads[0], None, None, None, None)


@dataclass(frozen=True, slots=True, eq=False)
class HalfSegments:
    """The segments of one head half on one rank: those with halo tokens, and those that need no exchange.

    num_halo   h, as in the plan
    num_first  number of first local positions that may share a segment with the halo: those before the first group cut
    first      segments over the halo and these positions, concatenated; None where no segment has tokens of both
    local      the other segments, over local positions
    """

    num_halo: int
    num_first: int
    first: AttentionSegments | None
    local: AttentionSegments


@dataclass(frozen=True, slots=True, eq=False)
class ShardSegments:
    """The segments of a batch, for the attention of every layer. `halos` keeps each layer's for its recomputation."""

    group: SequenceGroup
    row_length: int
    group_size: int
    plain: HalfSegments
    shifted: HalfSegments
    keep_halos: bool = True
    halos: dict[int, Halos] = field(default_factory=dict)

    def plan(self, num_heads: int, num_kv_heads: int) -> HaloPlan:
        return _plan(self.row_length, self.group.size, self.group_size, num_heads, num_kv_heads)


_plan = lru_cache(HaloPlan)  # the same for every layer


def segment_shard(
    document_ids_BN: Tensor, group: SequenceGroup, group_size: int, *, keep_halos: bool = True
) -> ShardSegments:
    """Find the segments on `group.rank`, from the document ids of whole rows (on the CPU; −1 is padding).

    A document is a run of equal ids in a row, and may extend over several ranks. Raises ValueError for an odd group.
    """
    check_group_size(group_size)
    row_length = document_ids_BN.shape[1]
    start = group.rank * (row_length // group.size)
    stop = start + row_length // group.size

    def half(offset: int) -> HalfSegments:
        ids_BR = document_ids_BN[:, group_start(start, group_size, offset) : stop]
        return _half(ids_BR, stop - start, group_size, (offset - start) % group_size)

    return ShardSegments(group, row_length, group_size, half(0), half(group_size // 2), keep_halos)


def _half(ids_BR: Tensor, length: int, group_size: int, to_cut: int) -> HalfSegments:
    """`to_cut` is the number of local positions, of `length`, before the first group cut."""
    num_columns = ids_BR.shape[1]
    num_halo, num_first = num_columns - length, min(to_cut, length)
    segments = find_segments(ids_BR, group_size, (num_halo + to_cut) % group_size)
    row_S, column_S, lengths_S = segments.begins_S // num_columns, segments.begins_S % num_columns, segments.lengths_S
    is_local_S = column_S >= num_halo
    is_both_S = ~is_local_S & (column_S + lengths_S > num_halo)
    local_S, first_S = row_S * length + column_S - num_halo, row_S * (num_halo + num_first) + column_S
    local = AttentionSegments(local_S[is_local_S], lengths_S[is_local_S])
    first = AttentionSegments(first_S[is_both_S], lengths_S[is_both_S]) if bool(is_both_S.any()) else None
    return HalfSegments(num_halo, num_first, first, local)


def attend_shard(
    q_BHLD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor, segments: ShardSegments, *, layer: int, scale: float | None = None
) -> Tensor:
    """Compute this rank's part of what `attend` gives for whole rows → (B, L, H, D).

    It is a collective call of `segments.group`. `layer` is the key of this layer's halos for its recomputation.

    In each half, the segment with halo tokens has more keys than queries. Zeros replace the queries of other ranks, so
    that the causal kernel can be used: for a halo of half a group this is a third more work, in this segment.
    """
    plan = segments.plan(q_BHLD.shape[1], k_BKLD.shape[1])
    kept = segments.halos.pop(layer, None)
    exchange = HaloExchange(plan, segments.group, kept)
    k_BKLD, v_BKLD, token = exchange.start(k_BKLD, v_BKLD)

    def attend(half: Half, part: AttentionSegments, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        repeats = plan.num_heads // plan.num_kv_heads
        return attend_heads(q, k, v, part, first=half.query_heads.start, repeats=repeats, scale=scale)

    halves = []
    for half, of_half in zip(plan.halves, (segments.plain, segments.shifted), strict=True):
        q, k, v = (
            q_BHLD[:, _slice(half.query_heads)],
            k_BKLD[:, _slice(half.kv_heads)],
            v_BKLD[:, _slice(half.kv_heads)],
        )
        halves.append((half, of_half, q, k, v, attend(half, of_half.local, q, k, v)))

    halos = exchange.finish(token)
    if segments.keep_halos and kept is None and torch.is_grad_enabled():
        segments.halos[layer] = halos.detach()
    outs: list[Tensor] = []
    for (half, of_half, q, k, v, out), halo in zip(halves, halos, strict=True):
        if of_half.first is not None:
            num_halo, num_first = of_half.num_halo, of_half.num_first
            first = attend(
                half,
                of_half.first,
                F.pad(q[:, :, :num_first], (0, 0, num_halo, 0)),
                torch.cat([halo.k, k[:, :, :num_first]], dim=2),
                torch.cat([halo.v, v[:, :, :num_first]], dim=2),
            )
            # Where one of them has a position, the other one is 0.
            out = torch.cat([first[:, num_halo:] + out[:, :num_first], out[:, num_first:]], dim=1)
        outs.append(out)
    return bind(torch.cat(outs, dim=2), halos)


def _slice(numbers: range) -> slice:
    return slice(numbers.start, numbers.stop)
