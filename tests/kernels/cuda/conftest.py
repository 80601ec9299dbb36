"""Engines with the CUDA C++ kernels, compiled for the CPU.

What needs a GPU is simulated: a copy on another stream is one that is delayed until it is waited for; a graph is a tape
of launches, see `tests.fixtures.tape`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest

from loray.bases.registry import BaseModel
from loray.spec import RopeParameters
from loray_kernels import Parts
from loray_kernels.cuda import graphs, tables
from loray_kernels.cuda.ops import CudaOps
from tests.fixtures.peft_adapters import TestAdapter
from tests.fixtures.shim import NotingLauncher, or_skip
from tests.fixtures.shim_ops import ShimOps, use_shim_ops


@pytest.fixture
def launcher() -> NotingLauncher:
    return or_skip(NotingLauncher)


@pytest.fixture
def gathers(launcher: NotingLauncher, monkeypatch: pytest.MonkeyPatch) -> CudaOps:
    """The kernels alone: the tokens of every adapter are gathered, however many it has."""
    monkeypatch.setattr(tables, "GATHER_BELOW", 1 << 30)
    return CudaOps(launcher, cast(Any, None))


@pytest.fixture
def ops(monkeypatch: pytest.MonkeyPatch) -> ShimOps:
    """Few steps are recorded before the start, of eight rows: each takes a tenth of a second."""
    monkeypatch.setattr(graphs, "SIZES", (8,))
    monkeypatch.setattr(graphs, "KINDS", (Parts.NONE, Parts.LORA, graphs.KINDS[-1]))
    return use_shim_ops(monkeypatch)


@pytest.fixture
def base_ops(monkeypatch: pytest.MonkeyPatch) -> ShimOps:
    """For engines without adapters: their recorded step has four rows."""
    monkeypatch.setattr(graphs, "SIZES", (4,))
    monkeypatch.setattr(graphs, "KINDS", (Parts.NONE,))
    return use_shim_ops(monkeypatch)


@pytest.fixture(scope="session")
def base(tiny_base: Callable[..., BaseModel]) -> BaseModel:
    return tiny_base("Qwen3ForCausalLM")


@pytest.fixture(scope="session")
def adapters(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> list[TestAdapter]:
    from peft import LoraConfig

    from tests.fixtures.peft_adapters import make_adapter

    folder = tmp_path_factory.mktemp("adapters")
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])
    return [make_adapter(base, folder / str(i), config, seed=i) for i in range(2)]


@pytest.fixture(scope="session")
def mixed(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, TestAdapter]:
    """LoRA of several ranks, on different modules and layers; DoRA, IA³, RoAd, VeRA of two pairs, MiSS, LongLoRA."""
    from peft import IA3Config, LoraConfig, MissConfig, RoadConfig, VeraConfig

    from tests.fixtures.peft_adapters import NORMS, make_adapter

    folder, attention = tmp_path_factory.mktemp("mixed"), ["q_proj", "k_proj", "v_proj", "o_proj"]
    configs = {
        "r2": LoraConfig(r=2, target_modules=attention),
        "r7": LoraConfig(r=7, target_modules=[*attention, "gate_proj", "up_proj", "down_proj"]),
        "r70": LoraConfig(r=70, target_modules=["k_proj", "down_proj"]),
        "pattern": LoraConfig(r=3, target_modules=["q_proj", "o_proj"], rank_pattern={"layers.1.self_attn.q_proj": 5}),
        "one layer": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], layers_to_transform=[1]),
        "dora": LoraConfig(r=4, target_modules=[*attention, "up_proj", "down_proj"], use_dora=True),
        "vera": VeraConfig(r=24, target_modules=["q_proj", "v_proj"], save_projection=False),
        "vera too": VeraConfig(r=24, target_modules=["q_proj", "v_proj"], save_projection=False),
        "vera of one layer": VeraConfig(
            r=21, target_modules=["q_proj"], layers_to_transform=[1], save_projection=False, projection_prng_key=3
        ),
        "miss": MissConfig(r=5, target_modules=[*attention, "up_proj", "down_proj"]),
        "rope": LoraConfig(r=3, target_modules=["q_proj"]),
        "longlora": LoraConfig(r=3, target_modules=attention, modules_to_save=["embed_tokens", *NORMS, "q_norm"]),
        "ia3": IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
        "road": RoadConfig(variant="road_2", group_size=8, target_modules=[*attention, "up_proj"]),
    }
    rope = RopeParameters(rope_type="linear", rope_theta=10000.0, factor=2.0)
    return {
        name: make_adapter(
            base,
            folder / name.replace(" ", "-"),
            config,
            seed=i,
            std=0.12,
            rope=rope if name in ("rope", "longlora") else None,
            num_token_rows=80,
        )
        for i, (name, config) in enumerate(configs.items())
    }
