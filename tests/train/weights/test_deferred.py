"""Bases that their strategies shard: the same weights bit for bit, and no rank that holds them whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from loray.bases.registry import BaseModel
from loray.spec import TrainSpec
from loray.train.mesh import World
from loray.train.model import BaseWeights, build_model
from loray.train.objectives import objective_of
from loray.train.strategies import prepare
from tests.fixtures.ranks import run_ranks
from tests.fixtures.training import METHODS, recipe

CPU = torch.device("cpu")
LARGE: dict[str, Any] = {"num_hidden_layers": 8, "hidden_size": 64, "intermediate_size": 512, "vocab_size": 320}
ADAPTERS: dict[str, dict[str, Any]] = METHODS | {
    "pissa": {"adapter": {"method": "lora", "rank": 4, "init": "pissa"}},
    "extras": {"adapter": {"method": "vera", "rank": 4, "train_embeddings": True, "train_norms": True}},
}


def spec_of(method: str, strategy: str, num_workers: int = 4, **fields: Any) -> TrainSpec:
    return recipe(**ADAPTERS[method], parallel={"strategy": strategy}, num_workers=num_workers, **fields)


@contextmanager
def one_of(rank: int, size: int) -> Iterator[World]:
    """This process as a rank whose collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield World.current()
    finally:
        dist.destroy_process_group()


class HostBytes(TorchDispatchMode):
    """The most bytes of tensors on the CPU that were made inside the block and existed at once."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if type(tensor) in (Tensor, nn.Parameter) and tensor.device == CPU:
                storage = tensor.untyped_storage()
                self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._live = {key: held for key, held in self._live.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self._live.values()))
        return made


@pytest.mark.parametrize(
    ("architecture", "method", "dtype", "tied"),
    [
        ("LlamaForCausalLM", "lora", "bfloat16", False),
        ("LlamaForCausalLM", "longlora", "float32", False),
        ("Qwen2ForCausalLM", "longlora", "bfloat16", True),
        ("Qwen3ForCausalLM", "extras", "float32", True),
        ("MistralForCausalLM", "vera", "bfloat16", True),
        ("Qwen3ForCausalLM", "miss", "bfloat16", True),
        ("LlamaForCausalLM", "pissa", "float32", False),
        ("Qwen2ForCausalLM", "dora", "bfloat16", False),
    ],
)
def test_shards_are_those_of_the_model_as_it_was_loaded_whole(
    architecture: str, method: str, dtype: str, tied: bool, tiny_base: Callable[..., BaseModel]
) -> None:
    base = tiny_base(architecture, tie_word_embeddings=tied, max_shard_size="100KB")
    whole = build_model(base, spec_of(method, "ddp", dtype=dtype))
    spec = spec_of(method, "fsdp2", dtype=dtype)
    model = build_model(base, spec)
    trained = {name for name, p in whole.named_parameters() if p.requires_grad}
    assert {name for name, p in model.named_parameters() if not p.is_meta} == trained
    buffers, expected = dict(model.named_buffers()), dict(whole.named_buffers())
    assert buffers.keys() == expected.keys()
    assert all(torch.equal(buffer, expected[name]) for name, buffer in buffers.items())
    assert not model.training
    with one_of(3, 4) as world:
        prepare(objective_of(model, spec), spec, world, CPU, BaseWeights(base, spec.dtype))
        shards = {name: p.to_local() for name, p in model.named_parameters(remove_duplicate=False)}  # type: ignore[operator]
    for name, parameter in whole.named_parameters(remove_duplicate=False):
        parts = parameter.chunk(4)
        expected_shard = parts[3] if len(parts) == 4 else parameter[:0]
        assert shards[name].dtype == expected_shard.dtype
        assert shards[name].requires_grad == (name in trained)
        assert torch.equal(shards[name], expected_shard), name
    assert shards.keys() == dict(whole.named_parameters(remove_duplicate=False)).keys()


def test_a_rank_holds_its_shards_and_one_tensor(tiny_base: Callable[..., BaseModel]) -> None:
    base = tiny_base(**LARGE, max_shard_size="200KB")
    assert len(list(base.path.glob("model-*.safetensors"))) > 5
    whole, spec = build_model(base, spec_of("lora", "ddp")), spec_of("lora", "fsdp2", num_workers=8)
    with one_of(0, 8) as world, HostBytes() as counted:
        model = build_model(base, spec)
        built = counted.peak
        prepare(objective_of(model, spec), spec, world, CPU, BaseWeights(base, spec.dtype))
    trained = sum(p.nbytes for p in whole.parameters() if p.requires_grad)
    frozen = [p.nbytes for p in whole.parameters() if not p.requires_grad]
    assert trained <= built < 2 * trained
    # The frozen shards; of what is trained the whole, which the test holds, a shard of it, its master and two moments.
    assert sum(frozen) / 8 < counted.peak < sum(frozen) / 8 + max(frozen) + 2 * trained
    assert counted.peak - 2 * trained < sum(frozen) / 4


def _gathered(rank: int, base: BaseModel, folder: Path, strategy: str) -> None:
    from torch.distributed.tensor import DTensor

    spec = spec_of("longlora", strategy, num_workers=2, dtype="bfloat16")
    model = build_model(base, spec)
    prepare(objective_of(model, spec), spec, World.current(), CPU, BaseWeights(base, spec.dtype))
    parameters: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
    if strategy == "fsdp2":
        full = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in parameters.items()}
    else:
        import deepspeed

        full = {}
        for name, p in parameters.items():
            assert p.ds_tensor.numel() < p.ds_numel or p.ds_numel == 1
            with deepspeed.zero.GatheredParameters([p]):
                full[name] = p.data.clone()
    torch.save({name: tensor.detach() for name, tensor in full.items()}, folder / f"{rank}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp2", "zero3"])
@pytest.mark.parametrize("tied", [False, True])
def test_ranks_together_hold_the_model(
    strategy: str, tied: bool, tiny_base: Callable[..., BaseModel], tmp_path: Path
) -> None:
    if strategy == "zero3":
        pytest.importorskip("deepspeed")
    base = tiny_base(tie_word_embeddings=tied, max_shard_size="100KB")
    run_ranks(_gathered, 2, tmp_path, base, tmp_path, strategy)
    model = build_model(base, spec_of("longlora", "ddp", dtype="bfloat16"))
    whole = dict(model.named_parameters(remove_duplicate=False))
    for rank in range(2):
        full = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert full.keys() == whole.keys()
        assert all(torch.equal(tensor, whole[name]) for name, tensor in full.items())
