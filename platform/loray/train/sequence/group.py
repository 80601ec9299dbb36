"""The ranks that share a row, and their messages."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor


@dataclass(slots=True)
class Traffic:
    """Bytes that one rank has sent. Recomputation counts as forward."""

    forward_bytes: int = 0
    backward_bytes: int = 0


@dataclass(frozen=True, slots=True)
class SequenceGroup:
    """`size` ranks; `rank` r holds the tokens [r·L, (r+1)·L) of every row. The default is a single process."""

    process_group: dist.ProcessGroup | None = None
    rank: int = 0
    size: int = 1
    traffic: Traffic = field(default_factory=Traffic, compare=False)

    @classmethod
    def of(cls, process_group: dist.ProcessGroup) -> SequenceGroup:
        """A collective call: NCCL's first communication needs all ranks of a group, and a halo may not involve all."""
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
