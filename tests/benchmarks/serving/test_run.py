"""The benchmark of serving on a tiny random base: adapters in a store, an engine in this process, ablations."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.memory import watch_memory
from benchmarks.serving.adapters import AdapterSet, Library, write_adapter
from benchmarks.serving.cases import ACCEPTANCE, PRESETS, EngineOptions, ablations
from benchmarks.serving.figures.rows import EngineWork
from benchmarks.serving.replay import Record
from benchmarks.serving.systems.engine import EngineSession, Setup
from benchmarks.serving.workload import Workload, generate
from loray.adapters.manifest import read_manifest
from loray.adapters.peft_format import read_adapter
from loray.bases.registry import BaseModel
from loray.methods.weights import LoraWeights
from loray.spec import ServeSpec
from tests.fixtures.s3 import S3Server

SET = AdapterSet(6, ranks=(4, 8))


@contextmanager
def session(library: Library, options: EngineOptions, **spec: Any) -> Iterator[EngineSession]:
    assert options.adapters is not None
    pool_bytes = options.pool_bytes(library.base.config)
    fields = {"pool_bytes": pool_bytes, "max_num_seqs": 4, "max_num_batched_tokens": 64, "dtype": "float32"} | spec
    setup = Setup(
        spec=ServeSpec(base="tiny-random", **fields),
        refs=tuple(library.publish(options.adapters)),
        store=library.url,
        catalog=library.catalog_url,
        home=library.folder / "node",
        folder=library.folder,
        ablation=options.ablation,
        kv_share=options.kv_bytes(library.base.config) / pool_bytes,
    )
    running = EngineSession(Setup.from_json(setup.to_json()))
    try:
        yield running
    finally:
        running.close()


def test_adapters_are_what_peft_reads(tmp_path: Path, tiny_base: Callable[..., BaseModel]) -> None:
    """PEFT's loader puts every tensor into its module."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = tiny_base()
    seven = AdapterSet(2, ranks=(4, 8), modules=("q_proj", "k_proj", "v_proj", "o_proj", "down_proj"))
    write_adapter(tmp_path / "a", base, seven, 1)
    hf = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    model = PeftModel.from_pretrained(hf, tmp_path / "a")
    theirs = {name: p for name, p in model.named_parameters() if "lora_" in name}
    ours = read_adapter(tmp_path / "a", base.config).modules
    assert len(theirs) == 2 * len(ours) == 2 * 2 * 5
    for key, module in ours.items():
        assert isinstance(module, LoraWeights)
        name = next(n for n in theirs if f"layers.{key.layer}." in n and f"{key.module}.lora_B" in n)
        assert torch.equal(theirs[name], module.b_OR.float())
        assert module.b_OR.float().std() == pytest.approx(0.05, rel=0.2)
        assert module.a_RI.shape[0] == 8


def test_padding_adds_zero_rows_and_keeps_the_product(tmp_path: Path, base: BaseModel) -> None:
    write_adapter(tmp_path / "plain", base, SET, 0)
    write_adapter(tmp_path / "padded", base, replace(SET, padded=True), 0)
    plain, padded = (read_adapter(tmp_path / n, base.config).modules for n in ("plain", "padded"))
    for key, module in plain.items():
        wide = padded[key]
        assert isinstance(module, LoraWeights)
        assert isinstance(wide, LoraWeights)
        assert (module.a_RI.shape[0], wide.a_RI.shape[0], wide.scale) == (4, 8, module.scale)
        assert (wide.a_RI[4:] == 0).all()
        assert (wide.b_OR.float() @ wide.a_RI.float() == module.b_OR.float() @ module.a_RI.float()).all()


def test_adapters_are_published_once(library: Library) -> None:
    refs = library.publish(SET)
    assert len({r.digest for r in refs}) == 6
    assert [r.nbytes for r in refs] == [SET.nbytes(i, library.base.config) for i in range(6)]
    objects = {p: p.stat().st_mtime_ns for p in (library.folder / "store").rglob("*") if p.is_file()}
    assert library.publish(SET, 4) == refs[:4]
    assert {p: p.stat().st_mtime_ns for p in (library.folder / "store").rglob("*") if p.is_file()} == objects
    (fetched,) = library.fetch(refs[:1])
    assert read_manifest(fetched).rank == 4


def test_an_engine_runs_a_workload_from_the_store(library: Library) -> None:
    """Six adapters over a pool of three: the figures that follow from the workload."""
    workload = Workload(12, num_adapters=6, at_once=4, inputs=(8, 16), outputs=(3, 5))
    requests = generate(workload, 512)
    with session(library, EngineOptions(SET, pool_adapters=3, kv_tokens=256)) as running:
        result = running.run(requests, workload.at_once)
        again = running.run(requests, workload.at_once)
    records, work = [Record(**r) for r in result["records"]], EngineWork(**result["work"])
    assert [len(r.ids) for r in records] == [r.max_tokens for r in requests]
    assert not [r.error for r in records if r.error]
    refs = library.publish(SET)
    assert work.loaded_bytes == 2 * sum(r.nbytes for r in refs)  # bf16 in the store, fp32 on the host
    assert work.placed_bytes >= sum(r.nbytes for r in refs)
    assert work.pool_hits + work.host_hits + work.misses == pytest.approx(1)
    assert work.adapters_max <= 4
    assert EngineWork(**again["work"]).loaded_bytes == 0
    assert [r["ids"] for r in again["records"]] == [r.ids for r in records]


def test_vera_adapters_share_one_pair(library: Library) -> None:
    vera = AdapterSet(6, (16,), ("q_proj", "k_proj", "v_proj", "o_proj"), method="vera")
    refs, config = library.publish(vera), library.base.config
    assert [r.nbytes for r in refs] == [vera.nbytes(i, config) for i in range(6)]
    (pair,) = {read_manifest(folder).projection for folder in library.fetch(refs)}
    assert pair is not None
    assert 2 * pair.rank * (pair.max_in + pair.max_out) == vera.pair_bytes(config)
    shapes = [config.module_shape(module) for module in vera.modules]
    inputs = shapes[0][1] + shapes[3][1]  # of q, k, v together, and of o
    assert vera.shared_weights(config) == 16 * config.num_layers * (inputs + sum(out for out, _ in shapes))
    workload = Workload(12, num_adapters=6, at_once=4, inputs=(8, 16), outputs=(3, 5))
    options = EngineOptions(vera, pool_for_adapters=1 << 20, kv_tokens=256)
    with session(library, options) as running:
        result = running.run(generate(workload, 512), workload.at_once)
    assert not [r["error"] for r in result["records"] if r["error"]]
    assert EngineWork(**result["work"]).num_residents == 6


def test_adapters_come_from_a_bucket_as_well(
    tmp_path: Path, base: BaseModel, library: Library, s3_server: S3Server
) -> None:
    bucket = Library(tmp_path / "s3", s3_server.url(), base)
    assert bucket.publish(SET) == library.publish(SET)
    requests = generate(Workload(2, num_adapters=2, at_once=2, outputs=(3, 3)), 512)
    results = []
    for source in (bucket, library):
        with session(source, EngineOptions(SET)) as running:
            results.append(running.run(requests, 2))
    assert results[0]["work"]["loaded_bytes"] > 0
    assert [r["ids"] for r in results[0]["records"]] == [r["ids"] for r in results[1]["records"]]


@pytest.mark.parametrize("ablation", ["no-prefetch", "fixed-split"])
def test_an_ablation_gives_the_same_tokens(library: Library, ablation: str) -> None:
    workload = Workload(12, num_adapters=6, at_once=8, inputs=(8, 16), outputs=(3, 5))
    requests = generate(workload, 512)
    tokens = []
    for name in (None, ablation):
        options = EngineOptions(SET, pool_adapters=3, kv_tokens=256, ablation=name)
        with session(library, options) as running:
            tokens.append([r["ids"] for r in running.run(requests, workload.at_once)["records"]])
            if name == "fixed-split":
                pool = running._engine.pool
                kv_blocks = int(options.kv_bytes(library.base.config) / pool.tensor.nbytes * pool.geometry.num_blocks)
                assert pool.allocator.allocate_kv(kv_blocks + 1) is None
    assert tokens[0] == tokens[1]
    assert all(tokens[0])


def test_without_prefetch_only_those_in_turn_are_loaded(library: Library) -> None:
    requests = generate(Workload(6, num_adapters=6, at_once=6, outputs=(2, 2)), 512)
    options = EngineOptions(SET, ablation="no-prefetch", kv_tokens=512)
    with session(library, options, max_num_seqs=1) as running:
        engine = running._engine
        seen = []
        step = engine.step

        def watched() -> Any:
            outputs = step()
            seen.append(len(engine.scheduler.waiting) + len(engine.scheduler.running))
            return outputs

        engine.step = watched  # type: ignore[method-assign]
        running.run(requests, 6)
    assert max(seen) == 1


def test_memory_is_that_of_a_process_and_its_children() -> None:
    held = 64 << 20
    code = f"x = b'1' * {held}; print(flush=True); input()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
    process = subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        process.stdout.readline()
        with watch_memory(process.pid) as peak:
            pass
        process.communicate("\n")
    assert held < peak.nbytes < held + (64 << 20)


def test_presets_are_well_formed() -> None:
    for cases in (*PRESETS.values(), ablations(("fixed-split", "no-prefetch", "padded-ranks"))):
        assert len({c.name for c in cases}) == len(cases)
        for case in cases:
            w, adapters = case.workload, case.engine.adapters
            assert (adapters is not None and w.first_adapter + w.num_adapters <= adapters.num) or not w.num_adapters
            assert w.max_tokens <= case.engine.kv_tokens
    rank = next(c.workload.first_adapter for c in ACCEPTANCE if c.name == "one stream, rank 64")
    assert AdapterSet(100).rank(rank) == 64
