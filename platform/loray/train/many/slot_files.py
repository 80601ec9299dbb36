"""An adapter's files of its slot's numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from loray.adapters.peft_format import CONFIG_FILE, WEIGHTS_FILE, AdapterFiles
from loray.bases.checkpoint import header_end, parse_header


class SlotFiles(NamedTuple):
    """Where the numbers of a slot lie in the files of its adapter, of which only they change from step to step.

    sizes  numbers of each tensor and of each gap, in the slot's order
    order  which of these follow each other in the file of weights, behind its header
    """

    config: bytes
    header: bytes
    sizes: list[int]
    order: list[int]

    @classmethod
    def of(cls, adapter: AdapterFiles, files: Mapping[str, bytes], slot: Tensor) -> SlotFiles | None:
        """Find that in the `files` of an adapter with tensors in `slot`; None where they are not all of its numbers."""
        weights = files[WEIGHTS_FILE]
        header = weights[: header_end(weights, source=WEIGHTS_FILE)]
        entries = parse_header(header, source=WEIGHTS_FILE)
        starts = {
            (adapter.tensors[name].data_ptr() - slot.data_ptr()) // slot.itemsize: (entry.start, adapter.tensors[name])
            for name, entry in entries.items()
        }
        sizes, at, end = [], {}, 0
        for start, (position, tensor) in sorted(starts.items(), key=lambda item: item[0]):
            if start < end or start + tensor.numel() > slot.numel() or tensor.dtype != slot.dtype:
                return None
            if start > end:
                sizes.append(start - end)
            at[position] = len(sizes)
            sizes.append(tensor.numel())
            end = start + tensor.numel()
        if end < slot.numel():
            sizes.append(slot.numel() - end)
        found = cls(files[CONFIG_FILE], header, sizes, [at[position] for position in sorted(at)])
        return found if found.files(slot) == files else None

    def files(self, slot: Tensor) -> dict[str, bytes]:
        """Make the files of these numbers."""
        pieces = torch.split(slot, self.sizes)
        weights = torch.cat([pieces[i] for i in self.order])
        return {CONFIG_FILE: self.config, WEIGHTS_FILE: b"".join((self.header, weights.view(torch.uint8).numpy().data))}
