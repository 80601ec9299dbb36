"""A rank's part of a batch, and the messages of its group.

Shapes: B rows, T positions of the whole row as collated, N = P·L of them after padding, L of one rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from loray.errors import UnsupportedError
from loray.methods.alora_module import WholeRows, part_of
from loray.planning.sequence import padded_length
from loray.spec import RopeType
from loray.train.data.batches import IGNORED, TrainBatch


@dataclass(slots=True)
class SentBytes:
    """Bytes that one rank has sent. Recomputation counts as forward."""

    forward_bytes: int = 0
    backward_bytes: int = 0


@dataclass(frozen=True, slots=True)
class SequenceGroup:
    """`size` ranks; `rank` r holds the tokens [r·L, (r+1)·L) of every row. The default is a single process."""

    process_group: dist.ProcessGroup | None = None
    rank: int = 0
    size: int = 1
    traffic: SentBytes = field(default_factory=SentBytes, compare=False)

    @classmethod
    def of(cls, process_group: dist.ProcessGroup) -> SequenceGroup:
        """Make one on all ranks together: NCCL's first message needs all ranks of a group, which a halo may not."""
        dist.barrier(group=process_group)
        return cls(process_group, dist.get_rank(process_group), dist.get_world_size(process_group))


class Pending:
    """Messages that are being sent and received. It keeps their buffers until `wait`."""

    def __init__(self, works: list[dist.Work], buffers: list[Tensor]) -> None:
        self._works, self._buffers = works, buffers

    def wait(self) -> None:
        for work in self._works:
            work.wait()
        self._works, self._buffers = [], []


def post(group: SequenceGroup, sent: dict[int, Tensor], received: dict[int, Tensor]) -> Pending:
    """Start to send and to receive: at most one contiguous message per peer (a rank of the group) and direction."""
    ops = [dist.P2POp(dist.isend, x, group=group.process_group, group_peer=peer) for peer, x in sent.items()]
    ops += [dist.P2POp(dist.irecv, x, group=group.process_group, group_peer=peer) for peer, x in received.items()]
    if not ops:
        return Pending([], [])
    return Pending(dist.batch_isend_irecv(ops), [*sent.values(), *received.values()])


class ShardedBatch(NamedTuple):
    """This rank's part of a batch, and facts about the whole batch.

    local            inputs and labels of this rank's L positions, with positions and without an attention mask.
                     num_targets counts its labels; num_tokens is an equal share of the whole batch's, with an exact sum
    group            the ranks that share the batch
    document_ids_BN  on the CPU; equal ids that are neighbours are one document, −1 is padding
    whole            the tokens of whole rows with them, of which `local` is a part
    """

    local: TrainBatch
    group: SequenceGroup
    document_ids_BN: Tensor
    whole: WholeRows


def shard(batch: TrainBatch, group: SequenceGroup) -> ShardedBatch:
    """Take the part of `group.rank`. Every rank of the group calls it with the same batch; nothing is communicated.

    Rows are padded on the right to N, the next multiple of the group's size, with tokens without labels, which are a
    document of their own.
    """
    num_rows, num_tokens = batch.input_ids_BT.shape
    row_length = padded_length(num_tokens, group.size)
    padding = (0, row_length - num_tokens)
    length = row_length // group.size
    span = slice(group.rank * length, (group.rank + 1) * length)

    ids_BT = torch.zeros_like(batch.input_ids_BT) if batch.document_ids_BT is None else batch.document_ids_BT
    ids_BN = F.pad(ids_BT, padding, value=-1)
    position_ids_BT = batch.position_ids_BT
    if position_ids_BT is None:
        position_ids_BN = torch.arange(row_length).expand(num_rows, -1)
    else:
        ends_BN = torch.arange(padding[1]).expand(num_rows, -1)
        position_ids_BN = torch.cat([position_ids_BT, ends_BN], dim=1)
    labels_BL, following_BL = (
        None if tokens_BT is None else F.pad(tokens_BT, padding, value=IGNORED)[:, span].contiguous()
        for tokens_BT in (batch.labels_BT, batch.following_BT)
    )
    assert labels_BL is not None
    input_ids_BN = F.pad(batch.input_ids_BT, padding)
    local = TrainBatch(
        input_ids_BN[:, span].contiguous(),
        labels_BL,
        None,
        position_ids_BN[:, span].contiguous(),
        num_tokens=batch.num_tokens * (group.rank + 1) // group.size - batch.num_tokens * group.rank // group.size,
        num_targets=int((labels_BL != IGNORED).sum()),
        num_pairs=batch.num_pairs,
        rows=batch.rows,
        reference_B=batch.reference_B,
        following_BT=following_BL,
        desirable_P=batch.desirable_P,
        teacher_ids_BTK=_positions(batch.teacher_ids_BTK, padding, span),
        teacher_log_probs_BTK=_positions(batch.teacher_log_probs_BTK, padding, span),
    )
    return ShardedBatch(local, group, ids_BN, WholeRows(input_ids_BN, ids_BN, span))


def _positions(x_BTK: Tensor | None, padding: tuple[int, int], span: slice) -> Tensor | None:
    return None if x_BTK is None else F.pad(x_BTK, (0, 0, *padding))[:, span].contiguous()


# The frequencies of these types do not depend on the input.
_STATIC_ROPE = frozenset(get_args(RopeType)) - {"longrope"}


def _rope_types(config: Any) -> set[str]:
    """The RoPE types of a model. transformers has one set of RoPE parameters, or one for each kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [x for x in parameters.values() if isinstance(x, dict)] or [parameters]
    return {x.get("rope_type", "default") for x in nested}


class ActiveShard:
    """The sharded batch of the current context. `was_used` is True once a model's attention has taken it."""

    def __init__(self, sharded: ShardedBatch, keep_halos: bool) -> None:
        self.sharded, self.keep_halos, self.was_used = sharded, keep_halos, False

    def take(self, num_rows: int, num_tokens: int, attention_mask: Tensor | None, config: Any) -> ShardedBatch:
        """Give the batch to the mask function of a model.

        Raises ValueError or UnsupportedError where the model's results would differ from those for whole rows.
        """
        shape = tuple(self.sharded.local.input_ids_BT.shape)
        if (num_rows, num_tokens) != shape:
            raise ValueError(f"the model was given {(num_rows, num_tokens)} tokens; this rank's part has {shape}")
        if attention_mask is not None:
            raise ValueError("a sharded batch knows its padding; pass sharded.local's model_inputs, without a mask")
        unknown = _rope_types(config) - _STATIC_ROPE
        if unknown and self.sharded.group.size > 1:
            raise UnsupportedError(
                f"RoPE of type {', '.join(sorted(unknown))} takes its scale from the tokens that a rank holds, "
                f"not from whole rows; sequence parallelism needs one of {', '.join(sorted(_STATIC_ROPE))}"
            )
        self.was_used = True
        return self.sharded

    def check_positions(self, position_ids_BL: Tensor | None) -> None:
        """Raise ValueError where the model counts positions from 0 on every rank, since they were not passed to it."""
        expected = self.sharded.local.position_ids_BT
        assert expected is not None
        if position_ids_BL is not None and not bool((position_ids_BL.cpu() == expected).all()):
            raise ValueError("position_ids are not those of this rank's part; pass all of sharded.local's model_inputs")


_ACTIVE: ContextVar[ActiveShard | None] = ContextVar("loray_sequence_shard", default=None)


def active_shard() -> ActiveShard | None:
    return _ACTIVE.get()


class _GroupSum(torch.autograd.Function):
    """Σ of x over the ranks of a group. Each computes the same loss from it, of which a `size`-th is its own: the
    gradient of the whole is that of all these parts.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: SequenceGroup) -> Tensor:
        ctx.size = group.size
        total = x.clone()
        dist.all_reduce(total, group=group.process_group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.size, None


def sum_over_group(*parts: Tensor) -> tuple[Tensor, ...]:
    """Sum what the ranks have of whole rows: of those that share the batch of the current context.

    All of them compute the same loss from the sums; each gives its share of it, `1 / group_size()`.
    """
    group = _group()
    if group.size == 1:
        return parts
    return tuple(_GroupSum.apply(part, group) for part in parts)  # type: ignore[no-untyped-call]


def group_size() -> int:
    """Count the ranks that share the batch of the current context."""
    return _group().size


def _group() -> SequenceGroup:
    active = _ACTIVE.get()
    return SequenceGroup() if active is None else active.sharded.group


@contextmanager
def sequence_parallel(sharded: ShardedBatch, *, keep_halos: bool = True) -> Iterator[None]:
    """Forward passes inside the block treat `sharded.local` as this rank's part of longer rows.

    `keep_halos` matters with activation checkpointing: True keeps every layer's halo until the backward pass, so that
    recomputation exchanges nothing; False saves this memory and exchanges a second time.

    Raises UnsupportedError at the end where no attention used the sharded batch: the model's attention is another one,
    and its results are wrong.
    """
    active = ActiveShard(sharded, keep_halos)
    token = _ACTIVE.set(active)
    try:
        with part_of(sharded.whole):
            yield
    finally:
        _ACTIVE.reset(token)
    if sharded.group.size > 1 and not active.was_used:
        raise UnsupportedError(
            "the model attended within this rank's part alone; "
            "sequence parallelism needs a model of build_model, or dense(model, group) around it"
        )
