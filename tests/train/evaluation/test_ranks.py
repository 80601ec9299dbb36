"""Ranks that measure together find what one alone finds, each with a part of the base where the recipe shares it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loray.bases.registry import BaseModel
from loray.errors import EvaluationError
from loray.spec import Evaluation, PerplexitySpec, RetrievalSpec, RopeParameters, TrainSpec
from loray.train.checkpoint import save_adapter
from loray.train.evaluation import measure as module
from loray.train.evaluation.documents import Documents
from loray.train.evaluation.measure import MeasuredModel, load, measure, subjects
from loray.train.evaluation.perplexity import KeptFigures
from loray.train.mesh import Mesh
from loray.train.model import build_model
from tests.fixtures.ranks import run_ranks
from tests.fixtures.training import recipe
from tests.fixtures.training_data import documents

SIZE = 2
CPU = torch.device("cpu")
WHAT: dict[str, Any] = {
    "dtype": "float32",
    "perplexity": PerplexitySpec(context_lengths=(64, 200), stride=100, max_windows=None),
    "retrieval": [RetrievalSpec(context_lengths=(420,), depths=(0.0, 1.0), samples=2)],
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "data": {"strategy": "ddp"},
    "sequence": {"strategy": "ddp", "sequence": 2},
    "shared": {"strategy": "fsdp2"},
    "shared rows": {"strategy": "zero3", "sequence": 2},
    "shared, quantized": {"strategy": "ddp"},  # in training, which is not measured
}


def measured(base: BaseModel, spec: TrainSpec, adapter: Path, data: Documents, home: Path | None) -> Any:
    rope = RopeParameters(rope_type="linear", rope_theta=10000.0, factor=2)
    mesh = Mesh.build(spec.parallel.sequence, CPU)
    kept = KeptFigures(home, mesh=mesh)
    chosen = subjects(rope, adapter, compare=True)
    return measure(base, chosen, documents=data, **WHAT, kept=kept, mesh=mesh, trained_by=spec), kept


def _measure(rank: int, base: BaseModel, spec: TrainSpec, folder: Path) -> None:
    data, sizes = documents(700, 300), []

    def spied(*args: Any, **kwargs: Any) -> Any:
        model = load(*args, **kwargs)
        local = (p.to_local() if hasattr(p, "to_local") else p for p in model.parameters())
        sizes.append(sum(p.numel() for p in local))
        return model

    module.load = spied
    found, kept = measured(base, spec, folder / "adapter", data, folder / f"home-{rank}")
    torch.save({"found": found, "sizes": sizes, "counts": (kept.num_taken, kept.num_computed)}, folder / f"{rank}.pt")
    module.load = lambda *_, **__: pytest.fail("rank 0 has kept all of it")
    again, _ = measured(base, spec, folder / "adapter", data, folder / f"home-{rank}")
    assert again == found


def _measure_nan(rank: int, base: BaseModel, spec: TrainSpec, folder: Path) -> None:
    """A prompt of rank 1 is not finite: rank 0 must not wait for it."""
    data = documents(200)

    def broken(*args: Any, **kwargs: Any) -> Any:
        model = load(*args, **kwargs)
        if rank:
            model.model.model.norm.weight.data.fill_(float("nan"))
        return model

    module.load = broken
    with pytest.raises(EvaluationError, match="a key in 420 tokens is nan"):
        measured(base, spec, folder / "adapter", data, None)


@pytest.fixture(scope="module")
def base(tiny_base: Callable[..., BaseModel]) -> BaseModel:
    return tiny_base(std=0.05, num_hidden_layers=3, max_position_embeddings=512)


def trained(base: BaseModel, spec: TrainSpec, folder: Path) -> None:
    model = build_model(base, spec.model_copy(update={"quantization": None, "parallel": recipe().parallel}))
    draw, std = torch.Generator().manual_seed(1), {"vera": 2.0, "dora": 0.3}.get(spec.adapter.method, 0.1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += std * torch.randn(parameter.shape, generator=draw)
    save_adapter(model, spec.adapter, folder / "adapter")


def spec_of(method: str, layout: str) -> TrainSpec:
    quantized = {"quantization": {}} if "quantized" in layout else {}
    return recipe(method, num_workers=SIZE, parallel=LAYOUTS[layout], **quantized)


@pytest.mark.parametrize(
    ("method", "layout"),
    [("longlora", layout) for layout in ("data", "sequence", "shared", "shared rows")]
    + [("vera", "shared"), ("dora", "shared, quantized")],
)
def test_ranks_find_what_one_finds(base: BaseModel, method: str, layout: str, tmp_path: Path) -> None:
    spec = spec_of(method, layout)
    trained(base, spec, tmp_path)
    alone: tuple[Evaluation, ...] = measured(base, recipe(method), tmp_path / "adapter", documents(700, 300), None)[0]
    run_ranks(_measure, SIZE, tmp_path, base, spec, tmp_path)
    saved = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(SIZE)]
    assert saved[0]["found"] == saved[1]["found"]
    for ours, theirs in zip(saved[0]["found"], alone, strict=True):
        assert ours.model_copy(update={"value": 0.0}) == theirs.model_copy(update={"value": 0.0})
        assert ours.value == pytest.approx(theirs.value, rel=1e-4), ours
    values = {e.subject: e.value for e in alone if e.context_length == 64}
    assert abs(values["adapter"] / values["base_scaled"] - 1) > 0.01, "the adapter does next to nothing"
    folders = list(tmp_path.glob("home-*/cache/evaluations/*"))
    assert [folder.parents[2].name for folder in folders] == ["home-0"] * 3
    assert [s["counts"][0] for s in saved] == [0, 0]
    model = load(base, MeasuredModel("base"), dtype="float32", device=CPU)
    whole = sum(p.numel() for p in model.parameters())
    parts = [sum(s["sizes"][0] for s in saved), *(s["sizes"][0] for s in saved)]
    assert parts == ([whole, parts[1], whole - parts[1]] if "shared" in layout else [2 * whole, whole, whole])


def test_a_figure_of_one_rank_that_is_not_finite_ends_all(base: BaseModel, tmp_path: Path) -> None:
    spec = spec_of("longlora", "data")
    trained(base, spec, tmp_path)
    run_ranks(_measure_nan, SIZE, tmp_path, base, spec, tmp_path)
