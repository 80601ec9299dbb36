"""`loray doctor`: its checks, each with what is wrong planted, and the command with all of them."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sqlite3
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest
from click.testing import CliRunner

from loray.bases.registry import add_base
from loray.bases.rounding import add_rounded
from loray.catalog import Catalog
from loray.cli import doctor
from loray.cli.doctor import CHECKS, CheckResult, Situation, _specs, examined
from loray.cli.main import cli
from loray.errors import CatalogError, SpecError
from loray.local.cluster import LocalCluster, current_cluster, dead_cluster
from loray.local.processes import free_ports, pid_scope, write_state
from loray.local.serving import announced
from loray.machine import GpuRates, Machine, Rates
from loray.settings import Settings
from loray.spec import ServeSpec
from tests.cli.run import Loray
from tests.fixtures.authority import Authority
from tests.fixtures.calls import refused
from tests.fixtures.machines import AVX2, H100
from tests.fixtures.planning import HARDWARE, MACHINE
from tests.fixtures.tiny import write_checkpoint

Situations = Callable[..., Situation]
GIB = 1 << 30


class Usage(NamedTuple):
    """Of a disk."""

    total: int
    used: int
    free: int


@pytest.fixture
def situation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Situations:
    """`situation(shm=0, env={"LORAY_URL": …}, spec={"port": 1})`: what differs on a machine that is well, the
    environment, the spec.
    """

    def make(
        env: dict[str, str] | None = None,
        spec: dict[str, Any] | None = None,
        *,
        python: str = "3.12.1",
        requirements: Sequence[str] | None = ("numpy>=1.26", "torch>=2.6,<3", "mlflow-skinny>=3; extra == 'mlflow'"),
        installed: Mapping[str, str] | None = None,
        available: int = 16 * GIB,
        shm: int | None = 8 * GIB,
        disk_free: int = 100 * GIB,
        max_open_files: tuple[int, int] = (65536, 65536),
    ) -> Situation:
        distributions: dict[str, Any] = {"loray": requirements}
        distributions |= {"numpy": "2.0", "torch": "2.9.1"} if installed is None else installed

        def of(name: str) -> Any:
            if distributions.get(name) is None:
                raise PackageNotFoundError(name)
            return distributions[name]

        folder = tmp_path / "shm"
        if shm is not None:
            folder.mkdir(exist_ok=True)

        def disk_usage(path: Path) -> Usage:
            return Usage(200 * GIB, 0, (shm or 0) if path == folder else disk_free)

        monkeypatch.setattr(doctor, "python_version", lambda: python)
        monkeypatch.setattr(doctor, "requires", of)
        monkeypatch.setattr(doctor, "version", of)
        monkeypatch.setattr(doctor, "memory_left", lambda: available)
        monkeypatch.setattr(doctor, "_SHM", folder)
        monkeypatch.setattr(shutil, "disk_usage", disk_usage)
        monkeypatch.setattr(doctor, "getrlimit", lambda limit: max_open_files)
        settings = Settings.from_env({"LORAY_HOME": str(tmp_path / "home")} | (env or {}))
        return Situation(settings, ServeSpec(**{"base": "tiny"} | (spec or {})))

    return make


def check(finding: CheckResult, severity: str, message: str = "", repair: str = "") -> None:
    said = (finding.severity, message in finding.message, repair in (finding.mend or ""))
    assert said == (severity, True, True), finding


def test_of_several_bases_one_is_named(tmp_path: Path) -> None:
    file = tmp_path / "fleet.yaml"
    file.write_text("pool_bytes: 1MiB\nbases: [{base: a}, {base: b, pool_bytes: 2MiB}]\n")
    found, others = _specs(file, "b", 9000)
    assert (found.base, found.pool_bytes, found.port) == ("b", 2 << 20, 9000)
    assert [other.base for other in others] == ["a"]
    for name in (None, "c"):
        with pytest.raises(SpecError, match=r"several bases \(a, b\); say which one to examine, as in --base a"):
            _specs(file, name, None)


def test_of_one_base_the_command_line_overrides_the_file(tmp_path: Path) -> None:
    assert _specs(None, None, None)[0].base == "smollm2"
    file = tmp_path / "spec.yaml"
    file.write_text("base: a\npool_bytes: 1MiB\n")
    found, _ = _specs(file, "b", 9000)
    assert (found.base, found.pool_bytes, found.port) == ("b", 1 << 20, 9000)
    file.write_text("pool: 1\n")
    refused(SpecError, "pool: ", _specs, file, None, None)


OLD = {"numpy": "2.0", "torch": "2.5.0"}
Check = Callable[[Situation], CheckResult]
ALL = (doctor.python, doctor.packages, doctor.memory, doctor.shm, doctor.disk, doctor.files)


@pytest.mark.parametrize("of", ALL)
def test_all_is_well(of: Check, situation: Situations) -> None:
    finding = of(situation())
    assert (finding.severity, finding.mend) == ("ok", None), finding


@pytest.mark.parametrize(
    ("of", "planted", "severity", "message", "repair"),
    [
        (doctor.python, {"python": "3.10.4"}, "error", "Python 3.10.4", "-m venv"),
        (doctor.packages, {"installed": {"torch": "2.9"}}, "error", "numpy is missing", "pip install 'numpy>=1.26'"),
        (doctor.packages, {"installed": OLD}, "error", "torch 2.5.0 is not <3,>=2.6", "pip install 'torch<3,>=2.6'"),
        (doctor.packages, {"requirements": None}, "error", "not installed", "pip install -e ."),
        (doctor.memory, {"available": GIB // 4}, "error", "536.9 MB are needed", "--pool-bytes 128MiB"),
        (doctor.memory, {"available": GIB}, "warning", "host_bytes full", "--host-bytes 256MiB"),
        (doctor.shm, {"shm": 64 << 20}, "warning", "67.1 MB free", "--shm-size"),
        (doctor.shm, {"shm": None}, "warning", "is missing", "/dev/shm"),
        (doctor.disk, {"disk_free": GIB // 2}, "error", "536.9 MB of", "loray store gc --yes"),
        (doctor.disk, {"disk_free": 5 * GIB}, "warning", "free", "loray store gc --yes"),
        (doctor.files, {"max_open_files": (256, 65536)}, "error", "256 open files", "ulimit -n 800"),
        (doctor.files, {"max_open_files": (256, 256)}, "error", "256 open files", "limits.conf"),
    ],
)
def test_what_is_wrong_is_found(
    of: Check, planted: dict[str, Any], severity: str, message: str, repair: str, situation: Situations
) -> None:
    check(of(situation(**planted)), severity, message, repair)


def test_what_is_served_has_its_memory(situation: Situations) -> None:
    s = situation(available=0)
    with announced(s.settings.home, "http://127.0.0.1:1"):
        assert doctor.memory(s).severity == "ok"
    gpu = doctor.memory(situation(available=0, spec={"device": "cuda", "gpu_memory_utilization": 0.8}))
    assert gpu.message == "weights are on cuda; the pool has what they and the steps leave of 80% of its memory"
    given = doctor.memory(situation(available=0, spec={"device": "cuda", "pool_bytes": GIB}))
    assert (given.severity, given.message) == ("ok", "weights and a pool of 1.1 GB are on cuda")


def test_the_memory_of_all_bases_is_counted(situation: Situations) -> None:
    """What mends it leaves the other bases in the file."""
    s = situation(available=GIB)
    other = s.spec.model_copy(update={"base": "other", "pool_bytes": GIB * 3 // 4})
    found = doctor.memory(replace(s, others=(other,), file=Path("fleet.yaml")))
    check(found, "error", "536.9 MB of tiny", "set pool_bytes of tiny in fleet.yaml to 128MiB")
    assert "805.3 MB of other" in found.message
    gpu = other.model_copy(update={"device": "cuda"})
    assert doctor.memory(replace(s, others=(gpu,))).severity == "warning"


def test_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    assert doctor.existing(tmp_path / "not" / "there") == tmp_path


def on(machine: Machine, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loray.machine.hardware", lambda: machine.hardware)
    machine.cache(home)


def test_the_machine_and_its_rates(situation: Situations, monkeypatch: pytest.MonkeyPatch) -> None:
    at = situation()
    on(MACHINE, at.settings.home, monkeypatch)
    found = doctor.machine(at)
    check(found, "ok", "a CPU (AVX-512 with bfloat16), 2 cores, 17.2 GB of memory")
    assert "products in GFLOP/s: bfloat16 400, float32 200; memory 40 GB/s" in found.message


def test_a_busy_machine_is_not_measured(situation: Situations, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loray.machine.hardware", lambda: HARDWARE)
    monkeypatch.setattr("loray.cli.plan.psutil.cpu_percent", lambda seconds: 90.0)
    assert "not measured yet, because it is busy" in doctor.machine(situation()).message


def test_what_it_means_for_the_base(situation: Situations, monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    at = situation()
    assert "without the base tiny" in doctor.speed(at).message
    add_base(str(checkpoint), home=at.settings.home)
    slow = Rates({"bfloat16": 2e10, "float32": 1e11}, 8e10, 8e10, bandwidth=3e10)
    on(Machine(AVX2, slow), at.settings.home, monkeypatch)
    told = doctor.speed(at).message
    assert "trains in float32 (this CPU has no bfloat16 products (AVX2)), LoRA at about " in told
    assert "serves in bfloat16 (half the bytes to read" in told
    assert "with steps of up to 32 requests and 512 tokens; 32 requests at once at about " in told
    on(Machine(replace(AVX2, gpus=(H100,)), replace(slow, gpu=GpuRates(6e14, 2.5e12))), at.settings.home, monkeypatch)
    told = doctor.speed(situation(spec={"device": "cuda"})).message
    assert "trains in bfloat16 (H100 80GB HBM3 multiplies it in hardware)" in told
    assert "serves in bfloat16 (H100 80GB HBM3 multiplies it in hardware) with steps of up to 256 requests" in told


def test_a_home_that_cannot_be_written_to(situation: Situations, tmp_path: Path) -> None:
    assert doctor.home(situation()).severity == "ok"
    assert not (tmp_path / "home").exists()
    for path in ("/proc/nowhere/home", "/sys/home"):
        away = doctor.home(situation(env={"LORAY_HOME": path}))
        check(away, "error", f"LORAY_HOME={path} cannot be written to", "export LORAY_HOME=")
    (tmp_path / "file").touch()
    check(doctor.home(situation(env={"LORAY_HOME": f"{tmp_path}/file/home"})), "error", "is a file")


def test_a_base_that_is_missing_or_damaged(situation: Situations, tmp_path: Path) -> None:
    s = situation()
    check(doctor.base(s), "error", repair="loray base add tiny")
    base = add_base(str(write_checkpoint(tmp_path / "tiny")), home=s.settings.home)
    deep = replace(s, deep=True)
    assert [doctor.base(s).severity, doctor.base(deep).severity] == ["ok", "ok"]
    weights = base.path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + b"x")
    assert [doctor.base(s).severity, doctor.base(deep).severity] == ["ok", "error"]
    weights.write_bytes(whole[:-100])
    check(doctor.base(s), "error", "is damaged", f"loray base add {base.source} --name tiny")
    weights.write_bytes(whole)
    form = add_rounded(base, "int8", home=s.settings.home)
    (form.path / "model.safetensors").write_bytes(whole[:-100])
    of_form = situation(spec={"base": "tiny-int8"})
    check(doctor.base(of_form), "error", "is damaged", "loray base add tiny --quantise int8 --name tiny-int8")
    record = form.path / "loray-base.json"
    record.write_text(
        record.read_text().replace("int8 of tiny", "nf4-single of tiny")
    )  # what --quantise has no name for
    check(doctor.base(of_form), "error", "is damaged", f"rm -r {form.path}  (training with that quantization of tiny")
    named = add_base(str(write_checkpoint(tmp_path / "best of breed")), home=s.settings.home, name="named")
    (named.path / "model.safetensors").write_bytes(whole[:-100])
    of_named = situation(spec={"base": "named"})
    check(doctor.base(of_named), "error", "is damaged", f"loray base add '{named.source}' --name named")
    (base.path / "loray-base.json").write_text("{}")
    assert "loray base add tiny" in (doctor.base(s).mend or "")


def test_a_cluster_that_died(situation: Situations, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    s = situation()
    assert doctor.cluster(s).severity == "ok"
    ended = subprocess.Popen(["true"])
    ended.wait()
    places = {"temp_dir": "/tmp/loray-none-such", "token_file": f"{tmp_path}/token", "log_file": f"{tmp_path}/log"}
    places |= {"address": "http://127.0.0.1:1", "gcs_address": "127.0.0.1:2", "scope": pid_scope()}
    state = LocalCluster(pid=ended.pid, started=1, **places)
    s.settings.home.mkdir()
    write_state(s.settings.home / "cluster.json", state)
    check(doctor.cluster(s), "error", f"process {ended.pid}", "loray down")
    assert current_cluster(s.settings.home) is None
    assert dead_cluster(s.settings.home) is not None
    env = {"LORAY_HOME": str(s.settings.home)}
    assert "removed what was left of a Ray cluster" in CliRunner().invoke(cli, ["down"], env=env).output
    assert doctor.cluster(s).severity == "ok"
    assert "nothing is running" in CliRunner().invoke(cli, ["down"], env=env).output


def test_no_compiler(situation: Situations, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    check(doctor.compiler(situation()), "error", repair="apt-get install g++")
    program = tmp_path / "g++"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert doctor.compiler(situation()).severity == "ok"
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert doctor.compiler(situation()).mend == "unset CXX"


def test_kernels_that_do_not_build_or_load(
    situation: Situations, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from loray_kernels.cpu import build

    assert doctor.load_kernels() == 0
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "/bin/false")
    held = (build.supported, build.functions, build._host, build._library)
    for cached in held:
        cached.cache_clear()
    try:
        reason = doctor.load_kernels()
    finally:
        for cached in held:
            cached.cache_clear()
    assert "/bin/false cannot compile the cpu kernels" in str(reason)
    monkeypatch.setattr(doctor, "kernels_problem", lambda: reason)
    assert "g++" in (doctor.kernels(situation()).mend or "")
    assert doctor.kernels(situation(spec={"device": "cuda:0"})).severity == "ok"


@pytest.mark.parametrize(
    ("code", "stderr", "message", "repair"),
    [
        (-4, "", "ended by signal 4", "rm -r ~/.cache/loray/kernels"),
        (1, "Traceback\nOSError: wrong ELF class\n", "wrong ELF class", "rm -r"),
        (1, "the cpu kernels cannot be kept in /x: why\n", "cannot be kept", "XDG_CACHE_HOME"),
    ],
)
def test_a_library_that_ends_its_process(
    code: int, stderr: str, message: str, repair: str, situation: Situations, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = subprocess.CompletedProcess[str](["python"], code, "", stderr)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: ended)
    check(doctor.kernels(situation()), "error", message, repair)


def set_revision(file: Path, revision: str) -> None:
    with closing(sqlite3.connect(file)) as database, database:
        database.execute("UPDATE alembic_version SET version_num = ?", (revision,))


def test_a_catalog_of_another_version(situation: Situations, tmp_path: Path) -> None:
    s, file = situation(), tmp_path / "home" / "catalog.db"
    assert doctor.catalog(s).message == "the catalog is empty; its tables are made at first use"
    assert not file.exists()
    Catalog(s.settings.catalog).close()
    assert doctor.catalog(s).severity == "ok"
    set_revision(file, "0003")
    check(doctor.catalog(s), "error", "before the first release (revision 0003)", "loray adapters import")
    set_revision(file, "9999")
    check(doctor.catalog(s), "error", repair="pip install --upgrade loray")
    with closing(sqlite3.connect(file)) as database:  # the check migrates nothing
        assert database.execute("SELECT version_num FROM alembic_version").fetchone() == ("9999",)


def test_a_catalog_that_cannot_be_read(situation: Situations, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "catalog.db").write_bytes(b"no database" * 1000)
    check(doctor.catalog(situation()), "error", "is damaged", "loray catalog restore")
    (port,) = free_ports(1)
    away = doctor.catalog(situation(env={"LORAY_CATALOG": f"postgresql://loray:secret@127.0.0.1:{port}/loray"}))
    check(away, "error", repair="LORAY_CATALOG")
    assert "secret" not in away.message


def test_a_store_that_cannot_be_written_to(situation: Situations) -> None:
    assert doctor.store(situation()).severity == "ok"
    away = doctor.store(situation(env={"LORAY_STORE": "file:///proc/nowhere/store"}))
    check(away, "error", "cannot be written to")


@pytest.fixture
def credentials(tmp_path: Path) -> Path:
    file = tmp_path / "credentials"
    file.write_text("[default]\naws_access_key_id = a\naws_secret_access_key = b\n")
    return file


def test_a_bucket_that_refuses_or_is_away(situation: Situations, credentials: Path) -> None:
    def found(endpoint: str) -> CheckResult:
        url = f"s3://bucket?endpoint_url={endpoint}&credentials_file={credentials}"
        return doctor.store(situation(env={"LORAY_STORE": url}))

    with refusing() as url:
        check(found(url), "error", repair="LORAY_STORE")
    (port,) = free_ports(1)
    check(found(f"http://127.0.0.1:{port}"), "error", str(port), "LORAY_STORE")


@pytest.mark.parametrize(
    ("minutes", "severity", "message"),
    [
        (0, "ok", "agree"),
        (20, "error", "behind the store's"),
        (-20, "error", "ahead of the store's"),
        (1, "warning", "behind"),
    ],
)
def test_clocks(minutes: int, severity: str, message: str, situation: Situations) -> None:
    with refusing(timedelta(minutes=minutes)) as url:
        check(doctor.clock(situation(env={"LORAY_STORE": f"s3://bucket?endpoint_url={url}"})), severity, message)


def test_the_clock_of_a_folder(situation: Situations, tmp_path: Path) -> None:
    assert "could not be compared" in doctor.clock(situation()).message
    (tmp_path / "home" / "store").mkdir(parents=True)
    assert "agree" in doctor.clock(situation()).message


def test_a_port_that_somebody_else_has(situation: Situations) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        port = s.getsockname()[1]
        here = situation(spec={"port": port})
        taken = f"port {port} is taken by process {os.getpid()}"
        check(doctor.port(here), "error", taken, f"loray up --port {port + 1}")
        with announced(here.settings.home, f"http://127.0.0.1:{port}"):
            assert doctor.port(here).message == f"loray serves at port {port}"
    assert doctor.port(situation(spec={"port": free_ports(1)[0]})).severity == "ok"


@contextmanager
def answering(answer: Callable[[str, str | None], tuple[int, bytes]], ahead: timedelta = timedelta()) -> Iterator[str]:
    """A server at this URL, with a clock that is ahead. `answer`: a path and the header Authorization → status and
    body.
    """

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, body = answer(self.path, self.headers.get("Authorization"))
            self.send_response_only(status)
            self.send_header("Date", format_datetime(datetime.now(UTC) + ahead, usegmt=True))
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_PUT = do_HEAD = _answer

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def refusing(ahead: timedelta = timedelta()) -> AbstractContextManager[str]:
    return answering(lambda path, authorization: (403, b""), ahead)


@contextmanager
def dashboard(*nodes: tuple[str, int, str]) -> Iterator[str]:
    """Ray's, for the token `ray`. `nodes`: address, port and state."""
    summary = [{"raylet": {"nodeManagerAddress": a, "nodeManagerPort": p, "state": s}} for a, p, s in nodes]
    body = json.dumps({"result": True, "msg": "", "data": {"summary": summary}}).encode()

    def answer(path: str, authorization: str | None) -> tuple[int, bytes]:
        return (200 if authorization == "Bearer ray" and path == "/nodes?view=summary" else 401), body

    with answering(answer) as url:
        yield url


@contextmanager
def raylet(host: str, env: dict[str, str] | None = None) -> Iterator[tuple[str, int, str]]:
    """A gRPC server as Ray's, with the files of `env`."""
    server = grpc.server(ThreadPoolExecutor(1))
    if env is None:
        port = server.add_insecure_port(f"{host}:0")
    else:
        certificate, key, authority = (
            Path(env[f"RAY_TLS_{name}"]).read_bytes() for name in ("SERVER_CERT", "SERVER_KEY", "CA_CERT")
        )
        credentials = grpc.ssl_server_credentials([(key, certificate)], authority, require_client_auth=True)
        port = server.add_secure_port(f"{host}:0", credentials)
    server.start()
    yield host, port, "ALIVE"
    server.stop(None).wait()


def test_several_nodes_without_tls(situation: Situations, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "ray")
    first, second = "127.0.0.1", "127.0.0.2"
    env, port = Authority(tmp_path).node(first, second), free_ports(1)[0]
    lost = ("127.0.0.3", port, "DEAD")

    def found(*nodes: tuple[str, int, str]) -> CheckResult:
        with dashboard(*nodes) as url:
            return doctor.encryption(situation(env={"LORAY_ADDRESS": url}))

    with raylet(first) as plain, raylet(first, env) as secure, raylet(second, env) as secure_too:
        away = (second, port, "ALIVE")
        for nodes, severity, message in (
            ([plain, secure_too, lost], "warning", "2 nodes, and what goes between them is not encrypted"),
            ([plain, away, lost], "warning", "2 nodes, and what goes between them is not encrypted"),
            ([secure, secure_too, lost], "ok", "2 nodes, with TLS between them"),
            ([secure, away], "ok", "cannot be seen from this machine"),
            ([plain, lost], "ok", "on one machine"),
        ):
            told = found(*nodes)
            assert (told.severity, message in told.message) == (severity, True), told
            assert ("RAY_USE_TLS" in (told.mend or "")) == (severity == "warning")
        assert "no network" in doctor.encryption(situation()).message
        monkeypatch.delenv("RAY_AUTH_TOKEN")
        assert "could not be asked" in found(plain, secure_too).message


@pytest.fixture
def keyed() -> Iterator[str]:
    """A server that wants the key `right`."""

    def answer(path: str, authorization: str | None) -> tuple[int, bytes]:
        passes = authorization == "Bearer right"
        model = {"id": "tiny", "object": "model", "created": 0, "owned_by": "loray"}
        model |= {"root": "tiny", "max_model_len": 64}
        models = {"object": "list", "data": [model]}
        refusal = {"error": {"message": "the API key has expired", "type": "invalid_request_error"}}
        return (200 if passes else 401), json.dumps(models if passes else refusal).encode()

    with answering(answer) as url:
        yield url


def test_a_server_that_is_away_or_refuses(situation: Situations, keyed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.server(situation()).severity == "ok"
    away = doctor.server(situation(env={"LORAY_URL": f"http://127.0.0.1:{free_ports(1)[0]}"}))
    check(away, "error", "no answer", "LORAY_URL")
    for key, severity, message in (
        ("", "error", "the API key is missing: the API key has expired"),
        ("wrong", "error", "the API key is refused: the API key has expired"),
        ("right", "ok", "1 models"),
    ):
        monkeypatch.setenv("LORAY_API_KEY", key)
        finding = doctor.server(situation(env={"LORAY_URL": keyed, "LORAY_API_KEY": key}))
        check(finding, severity, message, "loray keys create" if severity == "error" else "")


def test_a_check_that_fails_is_an_error_and_the_others_go_on(situation: Situations) -> None:
    def one(s: Situation) -> CheckResult:
        raise CatalogError("it is away")

    def two(s: Situation) -> CheckResult:
        return CheckResult("ok", "well")

    found = dict(examined((one, two), situation()))
    check(found["one"], "error", "it is away")
    check(found["two"], "ok")


@pytest.mark.usefixtures("known_rates")
def test_the_command(loray: Loray, monkeypatch: pytest.MonkeyPatch, checkpoint: object) -> None:
    monkeypatch.setattr(doctor, "kernels_problem", lambda: None)
    port = free_ports(1)[0]
    ailing = loray("doctor", "--base", "tiny", "--port", port)
    assert ailing.code == 1
    assert "→ loray base add tiny" in ailing.out
    told = json.loads(loray("doctor", "--base", "tiny", "--port", port, "--json").out)
    assert told["ok"] is False
    assert [check["name"] for check in told["checks"]] == [check.__name__ for check in CHECKS]
    assert {c["severity"] for c in told["checks"] if c["name"] != "base"} <= {"ok", "warning"}
    loray("base", "add", checkpoint)
    assert loray("doctor", "--base", "tiny", "--port", port).code == 0
    monkeypatch.setenv("LORAY_URL", f"http://127.0.0.1:{port}")
    away = json.loads(loray("doctor", "--json").out)
    assert [check["name"] for check in away["checks"]] == ["python", "packages", "server"]
    assert len(json.loads(loray("doctor", "--here", "--json").out)["checks"]) == len(CHECKS)
