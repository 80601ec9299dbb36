"""vLLM's OpenAI server from a separate environment, which gets prompts of token ids over HTTP.

It runs as its documentation says for this machine, with two choices: prefix caching is off, because no system's is
measured here, and `max_loras` is the number of adapters that can run at once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.serving.cases import EngineOptions
from benchmarks.serving.systems.cpu import of_tree
from benchmarks.serving.systems.processes import Session, Setting, run_process
from benchmarks.serving.systems.server import OpenAiSession, wait_until_healthy
from loray.local.processes import free_ports
from loray.spec import AdapterRef

_OPTIONS = {"return_token_ids": True}
_PRELOADED = ("libtcmalloc*.so*", "libiomp5.so")
_RANKS = (8, 16, 32, 64, 128, 256)  # values of --max-lora-rank that vLLM takes
_LIBRARIES = (Path("/usr/lib/x86_64-linux-gnu"), Path("/usr/lib64"))


@contextmanager
def serve_vllm(setting: Setting, options: EngineOptions, refs: Sequence[AdapterRef]) -> Iterator[Session]:
    """The server, ready, with these adapters registered from folders."""
    port = free_ports(1)[0]
    command = [setting.pythons["vllm"], "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--model", str(setting.base.path), "--served-model-name", setting.base.name, "--dtype", "bfloat16"]
    command += ["--max-num-seqs", str(options.max_num_seqs), "--no-enable-prefix-caching"]
    command += ["--max-num-batched-tokens", str(max(4096, options.max_num_batched_tokens))]
    command += ["--max-model-len", str(options.max_model_len)]
    if setting.base.source == "random":
        command += ["--load-format", "dummy", "--skip-tokenizer-init"]
    adapters, names = options.adapters, [ref.name for ref in refs]
    if adapters is not None and refs:
        folders = setting.library.fetch(list(refs))
        command += ["--enable-lora", "--max-lora-rank", str(min(r for r in _RANKS if r >= max(adapters.ranks)))]
        command += ["--max-loras", str(min(options.max_num_seqs, len(refs))), "--max-cpu-loras", str(len(refs))]
        command += ["--lora-target-modules", *adapters.modules]
        command += ["--lora-modules", *(f"{n}={f}" for n, f in zip(names, folders, strict=True))]
    with run_process("vllm", command, setting, env=_environment(setting)) as (process, log):
        began = time.perf_counter()
        wait_until_healthy("vllm", port, process, log)
        seconds, cpu = time.perf_counter() - began, of_tree("vllm", process.pid)
        yield OpenAiSession(port, setting.base.name, names, process.pid, seconds, cpu, _OPTIONS)


def _environment(setting: Setting) -> Mapping[str, str]:
    env = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    if setting.device != "cpu":
        return env
    own = Path(setting.pythons["vllm"]).parent.parent / "lib"
    preload = [str(found) for pattern in _PRELOADED if (found := _find(pattern, own)) is not None]
    return env | {
        "LD_PRELOAD": ":".join(preload),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{setting.num_threads - 1}",
    }


def _find(pattern: str, own: Path) -> Path | None:
    """The first match, in the environment before the system's folders."""
    candidates = [*sorted(own.rglob(pattern)), *(p for folder in _LIBRARIES for p in sorted(folder.glob(pattern)))]
    return candidates[0] if candidates else None
