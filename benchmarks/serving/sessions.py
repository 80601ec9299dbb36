"""The systems under test, each in processes of its own: the engine, `loray serve`, `loray up`, vLLM, llama.cpp, PEFT.

with open_session(system, setting, options, refs) as session:
    answers, work = session.run(requests, at_once)
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.client import Answer, Endpoint, Request
from benchmarks.serving import peft_worker
from benchmarks.serving.adapters import Library
from benchmarks.serving.cases import BESIDE, OURS, SERVE, UP, EngineOptions
from benchmarks.serving.engine import Setup
from benchmarks.serving.rows import EngineWork
from benchmarks.serving.workload import TimedRequest
from benchmarks.world import cpu_seconds, is_healthy, running, tree, until, with_variable
from loray.bases.registry import BaseModel
from loray.local.processes import free_ports
from loray.settings import Settings
from loray.spec import AdapterRef, ServeSpec

_START_S = 900.0
_SETTLE_S, _IDLE_S = 5.0, 10.0
_LORA_RANKS = (8, 16, 32, 64, 128, 256)  # values of --max-lora-rank that vLLM takes


class PassResult(NamedTuple):
    answers: list[Answer]
    work: EngineWork | None


@dataclass
class Session:
    """A running system.

    run         one pass of requests, in an open loop or so many at once
    pid         the root of its processes, if they have one
    cpu         seconds of the processor since its start
    idle_cores  what it uses of the processor when it has nothing to do; NaN if that was not measured
    """

    run: Callable[[Sequence[TimedRequest], int | None], PassResult]
    pid: int | None
    cpu: Callable[[], float]
    idle_cores: float = float("nan")


@dataclass(frozen=True, slots=True)
class Setting:
    """Values that all sessions of a run share. `pythons`: the interpreter of each peer."""

    base: BaseModel
    library: Library
    folder: Path
    device: str = "cpu"
    dtype: str = "auto"
    num_threads: int = 1
    pool_bytes: int | None = None
    pythons: Mapping[str, str] = field(default_factory=dict)

    def spec(self, options: EngineOptions, **more: Any) -> ServeSpec:
        """The spec of loray's engine for these options."""
        wide = 2 if self.dtype == "float32" else 1
        fields: dict[str, Any] = {
            "base": self.base.name,
            "device": self.device,
            "dtype": self.dtype,
            "pool_bytes": self.pool_bytes or wide * options.pool_bytes(self.base.config),
            "host_bytes": options.host_bytes,
            "max_num_seqs": options.max_num_seqs,
            "max_num_batched_tokens": options.max_num_batched_tokens,
            "num_threads": self.num_threads,
        }
        return ServeSpec(**fields | more)

    def environment(self, more: Mapping[str, str]) -> dict[str, str]:
        """Without what importing loray has set, which a peer would not have."""
        inherited = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
        return inherited | {"OMP_NUM_THREADS": str(self.num_threads), "PYTHONWARNINGS": "ignore", **more}


def open_session(
    system: str, setting: Setting, options: EngineOptions, refs: Sequence[AdapterRef]
) -> AbstractContextManager[Session]:
    """Run a system during the block. `refs`: the adapters that requests name by index. SystemExit, with the end of the
    system's log, if it fails.
    """
    kinds: dict[str, Callable[[Setting, EngineOptions, Sequence[AdapterRef]], AbstractContextManager[Session]]]
    kinds = {OURS: _engine, BESIDE: _engine_beside_cluster, SERVE: _serve, UP: _up, "vllm": _vllm, "llama": _llama}
    kinds |= {"peft": partial(_peft, cast=True), "peft-bf16": partial(_peft, cast=False)}
    if system not in kinds:
        raise SystemExit(f"unknown system {system!r}; known are {', '.join(kinds)}")
    return kinds[system](setting, options, refs)


@contextmanager
def _engine(setting: Setting, options: EngineOptions, refs: Sequence[AdapterRef]) -> Iterator[Session]:
    home = Path(tempfile.mkdtemp(prefix="node-", dir=setting.folder))
    spec, library = setting.spec(options).model_dump(mode="json"), setting.library
    named, places = [asdict(ref) for ref in refs], (library.url, library.catalog_url, str(home), str(setting.folder))
    command = [sys.executable, "-m", "benchmarks.serving.engine"]
    try:
        with _worker(OURS, command, json.dumps(Setup(spec, named, *places)._asdict()), setting) as session:
            yield session
    finally:
        shutil.rmtree(home, ignore_errors=True)


@contextmanager
def _engine_beside_cluster(setting: Setting, options: EngineOptions, refs: Sequence[AdapterRef]) -> Iterator[Session]:
    """The engine in process, while `loray up` runs and has nothing to do."""
    with _up(setting, options, refs) as cluster, _engine(setting, options, refs) as session:
        own = session.cpu
        session.cpu = lambda: own() + cluster.cpu()
        session.idle_cores = cluster.idle_cores
        yield session


@contextmanager
def _serve(setting: Setting, options: EngineOptions, refs: Sequence[AdapterRef]) -> Iterator[Session]:
    """`loray serve`, ready."""
    port, spec, env = _home(setting, options)
    command = [sys.executable, "-m", "loray.cli.main", "serve", "--spec", str(spec)]
    with _server("loray-serve", command, port, setting, env) as pid:
        yield Session(_over_http(port, setting, refs), pid, lambda: _cpu(tree(pid)))


@contextmanager
def _up(setting: Setting, options: EngineOptions, refs: Sequence[AdapterRef]) -> Iterator[Session]:
    """`loray up`, ready, and its cores when it is idle."""
    port, spec, env = _home(setting, options)

    def loray(*command: str) -> None:
        arguments = [sys.executable, "-m", "loray.cli.main", *command]
        done = subprocess.run(arguments, env=setting.environment(env), capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"loray {command[0]} failed:\n{done.stdout}{done.stderr}")

    def cpu() -> float:
        """Of all processes that `loray up` started for this home."""
        return _cpu(with_variable("LORAY_HOME", env["LORAY_HOME"]))

    try:
        loray("up", "--spec", str(spec))
        time.sleep(_SETTLE_S)
        before, since = cpu(), time.perf_counter()
        time.sleep(_IDLE_S)
        idle_cores = (cpu() - before) / (time.perf_counter() - since)
        yield Session(_over_http(port, setting, refs), None, cpu, idle_cores)
    finally:
        loray("down")


@contextmanager
def _vllm(setting: Setting, options: EngineOptions, refs: Sequence[AdapterRef]) -> Iterator[Session]:
    """vLLM's OpenAI server from a separate environment, with these adapters registered from folders.

    It runs as its documentation says for this machine, with two choices: prefix caching is off, because no system's is
    measured here, and `max_loras` is the number of adapters that can run at once.
    """
    port, base = free_ports(1)[0], setting.base
    command = [setting.pythons["vllm"], "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--model", str(base.path), "--served-model-name", base.name, "--dtype", "bfloat16"]
    command += ["--max-num-seqs", str(options.max_num_seqs), "--no-enable-prefix-caching"]
    command += ["--max-num-batched-tokens", str(max(4096, options.max_num_batched_tokens))]
    command += ["--max-model-len", str(options.max_model_len)]
    if base.source == "random":
        command += ["--load-format", "dummy", "--skip-tokenizer-init"]
    if (adapters := options.adapters) is not None and refs:
        rank = min(r for r in _LORA_RANKS if r >= max(adapters.ranks))
        command += ["--enable-lora", "--max-lora-rank", str(rank), "--max-cpu-loras", str(len(refs))]
        command += ["--max-loras", str(min(options.max_num_seqs, len(refs)))]
        command += ["--lora-target-modules", *adapters.modules, "--lora-modules"]
        folders = setting.library.fetch(list(refs))
        command += [f"{ref.name}={folder}" for ref, folder in zip(refs, folders, strict=True)]
    with _server("vllm", command, port, setting, _vllm_environment(setting)) as pid:
        yield Session(_over_http(port, setting, refs, {"return_token_ids": True}), pid, lambda: _cpu(tree(pid)))


@contextmanager
def _llama(setting: Setting, options: EngineOptions, refs: Sequence[AdapterRef]) -> Iterator[Session]:
    """llama.cpp's server with the base as a GGUF file, in the file's own precision, without a cache of prompts."""
    if refs:
        raise SystemExit("llama.cpp takes adapters as GGUF files; run it on cases of the base")
    server, _, model = setting.pythons["llama"].partition(":")
    port, slots = free_ports(1)[0], options.max_num_seqs
    command = [server, "--model", model, "--alias", setting.base.name, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--threads", str(setting.num_threads), "--parallel", str(slots), "--ctx-size", str(options.kv_tokens)]
    command += ["--batch-size", str(options.max_num_batched_tokens), "--kv-unified"]
    more = {"cache_prompt": False, "return_tokens": True}
    with _server("llama", command, port, setting, {}) as pid:
        yield Session(_over_http(port, setting, refs, more), pid, lambda: _cpu(tree(pid)))


def _vllm_environment(setting: Setting) -> dict[str, str]:
    """Without a GPU, libiomp5 and tcmalloc are preloaded: from the environment before the system's folders."""
    env = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    if setting.device != "cpu":
        return env
    own = Path(setting.pythons["vllm"]).parent.parent / "lib"
    libraries = (Path("/usr/lib/x86_64-linux-gnu"), Path("/usr/lib64"))
    preload: list[str] = []
    for pattern in ("libtcmalloc*.so*", "libiomp5.so"):
        found = [*sorted(own.rglob(pattern)), *(p for folder in libraries for p in sorted(folder.glob(pattern)))]
        preload += map(str, found[:1])
    threads = f"0-{setting.num_threads - 1}"
    more = {"LD_PRELOAD": ":".join(preload), "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": threads}
    return env | more


@contextmanager
def _peft(setting: Setting, options: EngineOptions, refs: Sequence[AdapterRef], *, cast: bool) -> Iterator[Session]:
    """`cast`: PEFT's default, adapters in fp32; else in the base's dtype."""
    adapters = [str(folder) for folder in setting.library.fetch(list(refs))]
    setup = {"model": str(setting.base.path), "adapters": adapters, "autocast_adapter_dtype": cast}
    name = "peft" if cast else "peft-bf16"
    with _worker(name, [setting.pythons[name], str(Path(peft_worker.__file__))], json.dumps(setup), setting) as session:
        yield session


@contextmanager
def _worker(name: str, command: list[str], setup: str, setting: Setting) -> Iterator[Session]:
    """A process that answers each line of JSON with one line."""
    log = _log(setting, name)
    with running(command, log, setting.environment({}), pipes=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        lines, answers = process.stdin, process.stdout

        def exchange(line: str) -> dict[str, Any]:
            answer = ""
            try:
                lines.write(line + "\n")
                lines.flush()
                answer = answers.readline()
            except BrokenPipeError:
                pass
            if not answer:
                raise SystemExit(f"{name} failed:\n{_tail(log)}")
            found: dict[str, Any] = json.loads(answer)
            return found

        def run(requests: Sequence[TimedRequest], at_once: int | None) -> PassResult:
            found = exchange(json.dumps({"requests": list(requests), "at_once": at_once}))
            work = None if found["work"] is None else EngineWork(**found["work"])
            return PassResult([Answer(**answer) for answer in found["answers"]], work)

        exchange(setup)
        yield Session(run, process.pid, lambda: _cpu(tree(process.pid)))
        lines.close()
        process.wait(20)


@contextmanager
def _server(name: str, command: Sequence[str], port: int, setting: Setting, env: Mapping[str, str]) -> Iterator[int]:
    """A server, healthy; yields its process."""
    log = _log(setting, name)
    with running(command, log, setting.environment(env)) as process:

        def answers() -> bool:
            if process.poll() is not None:
                raise SystemExit(f"{name} ended with code {process.returncode}:\n{_tail(log)}")
            return is_healthy(port)

        until(answers, f"{name} answers; its log is {log}", _START_S)
        yield process.pid


def _over_http(
    port: int, setting: Setting, refs: Sequence[AdapterRef], options: Mapping[str, Any] | None = None
) -> Callable[[Sequence[TimedRequest], int | None], PassResult]:
    endpoint = Endpoint(port, options=options or {})

    def one(request: TimedRequest) -> Request:
        model = setting.base.name if request.adapter is None else refs[request.adapter].name
        headers = {"X-Tenant-Id": request.tenant} if request.tenant else {}
        return Request(request.at, model, request.prompt_ids, request.max_tokens, request.streamed, headers)

    return lambda requests, at_once: PassResult(endpoint.run([one(r) for r in requests], at_once)[1], None)


def _home(setting: Setting, options: EngineOptions) -> tuple[int, Path, dict[str, str]]:
    """A port, a serve spec, and the settings of a home with this machine's bases, the benchmark's store and catalog."""
    home, (port,) = setting.folder / "served", free_ports(1)
    home.mkdir(exist_ok=True)
    if not (home / "bases").exists():
        (home / "bases").symlink_to(Settings.from_env().home / "bases")
    spec = home / "spec.json"  # JSON is YAML
    spec.write_text(setting.spec(options, port=port).model_dump_json(), encoding="utf-8")
    library = setting.library
    return port, spec, Settings(home, library.url, library.catalog_url, address=None, log_level="WARNING").to_env()


def _cpu(pids: Sequence[int]) -> float:
    return sum(map(cpu_seconds, pids))


def _log(setting: Setting, name: str) -> Path:
    return setting.folder / "logs" / f"{name}.log"


def _tail(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-3000:]
