"""The halo exchange of one layer. Keys and values are sent to later ranks during the attention that needs no halo.
Their gradients are sent back and added to those of the rank that owns them, before the backward pass of RoPE.

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

Shapes: B rows, K key-value heads of the model and K' of a half, L positions of this rank, h of a halo, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loray.planning.exchange.halo import HaloPlan
from loray.train.sequence.group import Pending, SequenceGroup, post


class KeysValues(NamedTuple):
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

    # Autograd calls these methods, in this order.

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
        """Gradients of local keys and values: `own`, and those that later ranks sent back."""
        if self._routes.sent:
            own = KeysValues(*(x.clone() for x in own))  # autograd may use these tensors elsewhere
        for place, part in self._arrived(self._routes.sent, Halos(own, own)):
            place.add_(part)
        return own

    # Messages.

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
    """`out`, made dependent on every halo for autograd, so that no rank's backward pass omits an exchange."""
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
