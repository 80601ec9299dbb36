"""One entry point for all systems under test, each of which runs in separate processes.

with open_session(system, setting, options, refs) as session:
    records, work = session.run(requests, at_once)
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from benchmarks.serving.cases import EngineOptions
from benchmarks.serving.figures.results import BESIDE, OUR_SYSTEMS, OURS, PEERS, SERVE, UP
from benchmarks.serving.systems import peft as peft_worker
from benchmarks.serving.systems.engine import Setup
from benchmarks.serving.systems.processes import Session, Setting, run_worker, serve_spec
from benchmarks.serving.systems.server import serve_alone, serve_cluster
from benchmarks.serving.systems.vllm import serve_vllm
from loray.spec import AdapterRef


@contextmanager
def open_session(
    system: str, setting: Setting, options: EngineOptions, refs: Sequence[AdapterRef]
) -> Iterator[Session]:
    """Run a system during the block. `refs`: the adapters that requests name by index. SystemExit, with the end of the
    system's log, if it fails.
    """
    if system == OURS:
        opened: AbstractContextManager[Session] = _engine(setting, options, refs)
    elif system == BESIDE:
        opened = _engine_beside_cluster(setting, options, refs)
    elif system == SERVE:
        opened = serve_alone(setting, options, refs)
    elif system == UP:
        opened = serve_cluster(setting, options, refs)
    elif system in ("peft", "peft-bf16"):
        opened = _peft(system, setting, refs)
    elif system == "vllm":
        opened = serve_vllm(setting, options, refs)
    else:
        raise SystemExit(f"unknown system {system!r}; known are {', '.join((*OUR_SYSTEMS, *PEERS))}")
    with opened as session:
        yield session


@contextmanager
def _engine_beside_cluster(setting: Setting, options: EngineOptions, refs: Sequence[AdapterRef]) -> Iterator[Session]:
    """The engine in process, while `loray up` runs and has nothing to do."""
    with serve_cluster(setting, options, refs) as cluster, _engine(setting, options, refs) as session:
        own = session.cpu
        session.cpu = lambda: {**own(), "cluster": sum(cluster.cpu().values())}
        session.idle_cores = cluster.idle_cores
        yield session


@contextmanager
def _engine(setting: Setting, options: EngineOptions, refs: Sequence[AdapterRef]) -> Iterator[Session]:
    home = Path(tempfile.mkdtemp(prefix="node-", dir=setting.folder))
    spec = serve_spec(setting, options)
    pool_bytes = spec.fixed_pool_bytes
    assert pool_bytes is not None, "pool_bytes must be given on a GPU"
    setup = Setup(
        spec=spec,
        refs=tuple(refs),
        store=setting.library.url,
        catalog=setting.library.catalog_url,
        home=home,
        folder=setting.folder,
        ablation=options.ablation,
        kv_share=options.kv_bytes(setting.base.config) / pool_bytes,
    )
    command = [sys.executable, "-m", "benchmarks.serving.systems.engine"]
    try:
        with run_worker(OURS, command, setup.to_json(), setting) as session:
            yield session
    finally:
        shutil.rmtree(home, ignore_errors=True)


@contextmanager
def _peft(system: str, setting: Setting, refs: Sequence[AdapterRef]) -> Iterator[Session]:
    """ "peft": PEFT's default, adapters in fp32. "peft-bf16": adapters in the base's dtype."""
    adapters = [str(folder) for folder in setting.library.fetch(list(refs))]
    setup = {"model": str(setting.base.path), "adapters": adapters, "autocast_adapter_dtype": system == "peft"}
    command = [setting.pythons[system], str(Path(peft_worker.__file__))]
    with run_worker(system, command, json.dumps(setup), setting) as session:
        yield session
