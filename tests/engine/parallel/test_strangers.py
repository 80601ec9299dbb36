"""Who is no rank of an engine: it runs nothing in one, takes no rank's place, and the engine starts."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from loray.bases.registry import BaseModel
from loray.engine.build import build_engine
from loray.engine.parallel.worker import LocalWorkers, WorkerArgs
from loray.spec import ServeSpec
from tests.conftest import REPOSITORY
from tests.engine.harness import make_engine, request, run
from tests.engine.model.test_parity import prompts

LOOPBACK = "127.0.0.1"


def own_address() -> str:
    """This machine's for others; loopback where it has no network."""
    found = [a.address for nic in psutil.net_if_addrs().values() for a in nic if a.family == socket.AF_INET]
    return next((address for address in found if not address.startswith("127.")), LOOPBACK)


def test_a_stranger_runs_nothing_and_the_engine_starts(tiny_base: Callable[..., BaseModel], tmp_path: Path) -> None:
    base, marker = tiny_base(), tmp_path / "ran"
    strangers: list[subprocess.Popen[str]] = []

    class Attacked(LocalWorkers):
        """The other ranks start when the stranger has tried the meeting."""

        def __init__(self, args: Sequence[WorkerArgs], base: BaseModel) -> None:
            arguments = [args[0].host, str(args[0].port), str(os.getpid()), str(marker)]
            command = [sys.executable, "-W", "ignore", "-m", "tests.engine.parallel.stranger", *arguments]
            stranger = subprocess.Popen(
                command, cwd=REPOSITORY, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            strangers.append(stranger)
            assert stranger.stdout is not None
            assert stranger.stdout.readline() == "tried\n"
            super().__init__(args, base)

        own_address = staticmethod(own_address)

    fields = {"base": base.name, "dtype": "float32", "pool_bytes": 8 << 20, "itl_slo_ms": 1e9}
    asked = [request("r", prompts(1)[0], max_tokens=4)]
    try:
        spec = ServeSpec(**fields, tensor_parallel_size=2, num_threads=1)
        engine = build_engine(spec, base, None, None, Attacked)  # type: ignore[arg-type]
        try:
            engine.warm_up()
            expected = run(make_engine(base, num_threads=1), asked)
            assert run(engine, asked) == expected
        finally:
            engine.close()
    finally:
        (stranger,) = strangers
        out, _ = stranger.communicate("", timeout=60)
    assert int(out) >= 3, "the meeting, and two groups of rank 0"
    assert stranger.returncode == 0
    assert not marker.exists()
