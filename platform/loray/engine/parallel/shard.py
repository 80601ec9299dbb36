"""Which part of the model a rank has: Megatron's split (Shoeybi et al., *Megatron-LM*, 2019).

q, k, v, gate and up are split by output (heads, columns of the MLP): column-parallel. o and down are split by input:
row-parallel, and each rank's result is a partial sum. Norms and the embedding are complete on every rank: adapters
replace whole embedding rows, and a vocabulary-parallel lookup would cost an all-reduce as wide as the hidden size. The
output head, all of which is read for every token, is split by vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from loray.bases.config import ModelConfig
from loray.errors import SpecError
from loray.spec import LINEAR_MODULES, ServeSpec

ROW_PARALLEL = frozenset({"o_proj", "down_proj"})
COLUMN_PARALLEL = frozenset(LINEAR_MODULES) - ROW_PARALLEL


@dataclass(frozen=True, slots=True)
class Shard:
    rank: int
    world_size: int

    def slice(self, size: int) -> slice:
        """The rank's part of `size` elements, which the ranks divide evenly."""
        assert size % self.world_size == 0
        own = size // self.world_size
        return slice(self.rank * own, (self.rank + 1) * own)


def check_divisible(config: ModelConfig, world_size: int) -> None:
    """SpecError unless the ranks evenly divide everything that is split."""
    sizes = {
        "attention heads": config.num_heads,
        "key/value heads": config.num_kv_heads,
        "columns of the MLP": config.intermediate_size,
        "hidden columns": config.hidden_size,
    }
    for what, size in sizes.items():
        if size % world_size:
            fitting = [n for n in range(1, size + 1) if not any(s % n for s in sizes.values())]
            raise SpecError(
                f"tensor_parallel_size={world_size} does not divide the base's {size} {what}; take one of {fitting}"
            )


def local_config(config: ModelConfig, shard: Shard) -> ModelConfig:
    """The configuration of one rank's decoder."""
    n = shard.world_size
    return replace(
        config,
        num_heads=config.num_heads // n,
        num_kv_heads=config.num_kv_heads // n,
        intermediate_size=config.intermediate_size // n,
        tie_word_embeddings=False,  # the head is split, the embedding is not
    )


def local_tensors(
    tensors: Iterable[tuple[str, Tensor]], config: ModelConfig, shard: Shard
) -> Iterator[tuple[str, Tensor]]:
    """The rank's parts of a checkpoint's tensors, with the same names."""
    for name, tensor in tensors:
        module, _, kind = name.removeprefix("model.").rpartition(".")
        last = module.rpartition(".")[2]
        if last in COLUMN_PARALLEL:
            yield name, tensor[shard.slice(tensor.shape[0])].clone()  # a view would keep the whole tensor
        elif last in ROW_PARALLEL:
            assert kind == "weight", "the decoder has no biases there"
            yield name, tensor[:, shard.slice(tensor.shape[1])].clone()
        elif last == "lm_head":
            if not config.tie_word_embeddings:  # some checkpoints have one although it is tied
                yield name, local_head(tensor, shard)
        else:
            yield name, tensor
        if last == "embed_tokens" and config.tie_word_embeddings:
            yield "lm_head.weight", local_head(tensor, shard)


def local_head(head_VD: Tensor, shard: Shard) -> Tensor:
    """The rank's rows, of a vocabulary that is padded with zeros so that the ranks divide it."""
    padding = -head_VD.shape[0] % shard.world_size
    padded = F.pad(head_VD, (0, 0, 0, padding)) if padding else head_VD
    return padded[shard.slice(padded.shape[0])].clone()


def local_device(spec: ServeSpec, rank: int) -> torch.device:
    """On CUDA each rank has a device of its own if the process sees several."""
    device = torch.device(spec.device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", rank % torch.cuda.device_count())
    return device
