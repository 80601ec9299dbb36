"""Requests on different LoRA adapters in one batch: the engine against transformers + PEFT, in-process, no HTTP.

    python -m serve_apps.bench.mixed_batch [--requests 32] [--adapters 0 1 8 32] [--json FILE]

The base is SmolLM2-135M in bf16; adapters have rank 8, 16, 32, 64 in turn on q, k, v, o. Every system runs in a process
of its own, one at a time, on the same adapters, prompts (64 tokens) and lengths (32 new tokens, end of text ignored).
The first pass of each process warms up and loads the adapters; the second is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

RANKS = (8, 16, 32, 64)
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj"]
PROMPT_TOKENS, NEW_TOKENS = 64, 32
SYSTEMS = ("loray", "peft")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=32, help="at once, in one batch")
    parser.add_argument("--adapters", type=int, nargs="+", default=[0, 1, 8, 32], help="distinct ones; 0 is the base")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--worker", nargs=3, metavar=("SYSTEM", "FOLDER", "N"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        system, folder, n = args.worker
        seconds = {"loray": _run_loray, "peft": _run_peft}[system](Path(folder), int(n), args.requests)
        click.echo(json.dumps({"seconds": seconds}))
        return
    results = _compare(args.requests, args.adapters)
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def _compare(num_requests: int, counts: list[int]) -> dict[str, Any]:
    facts = machine()
    click.echo("  ".join(f"{k} {v}" for k, v in facts.items()))
    click.echo(f"{num_requests} requests at once, {PROMPT_TOKENS} + {NEW_TOKENS} tokens each; output tokens/s")
    click.echo(f"{'adapters':>8}  {'loray':>8}  {'PEFT':>8}  {'ratio':>6}  {'of base':>8}  load before")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        write_adapters(Path(folder), max(counts))
        for n in counts:
            load = os.getloadavg()[0]
            rate = {s: num_requests * NEW_TOKENS / _worker(s, folder, n, num_requests) for s in SYSTEMS}
            rows.append({"adapters": n, "load_before": load} | rate)
            ratio, of_base = rate["loray"] / rate["peft"], rate["loray"] / rows[0]["loray"]
            click.echo(
                f"{n:>8}  {rate['loray']:>8.1f}  {rate['peft']:>8.1f}  {ratio:>6.2f}  {of_base:>8.2f}  {load:.2f}"
            )
    return {"machine": facts, "requests": num_requests, "rows": rows}


def _worker(system: str, folder: str, n: int, num_requests: int) -> float:
    command = [sys.executable, "-W", "ignore", "-m", "serve_apps.bench.mixed_batch", "--requests", str(num_requests)]
    done = subprocess.run([*command, "--worker", system, folder, str(n)], text=True, capture_output=True, check=False)
    if done.returncode:
        raise SystemExit(f"{system} failed:\n{done.stderr[-2000:]}")
    return float(json.loads(done.stdout.splitlines()[-1])["seconds"])


def machine() -> dict[str, str]:
    import peft
    import torch
    import transformers

    cpu = next(
        (x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), "?"
    )
    return {
        "cpu": f"{cpu} × {os.cpu_count()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def base_model() -> Any:
    from loray.bases.registry import add_base
    from loray.settings import Settings

    return add_base("smollm2", home=Settings.from_env().home)


def write_adapters(folder: Path, n: int) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    path = base_model().path
    for i in range(n):
        generator = torch.Generator().manual_seed(i)
        base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        model = get_peft_model(base, LoraConfig(r=RANKS[i % len(RANKS)], target_modules=MODULES))
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.copy_(0.05 * torch.randn(p.shape, generator=generator))
        model.save_pretrained(folder / f"a{i}")


def _prompts(num_requests: int) -> list[list[int]]:
    return [[(7919 * i + 31 * k) % 40000 + 100 for k in range(PROMPT_TOKENS)] for i in range(num_requests)]


def _run_loray(folder: Path, n: int, num_requests: int) -> float:
    import hashlib

    from loray.adapters.peft_format import read_adapter
    from loray.engine.engine import build_engine
    from loray.engine.request import GenerateRequest
    from loray.spec import AdapterRef, SamplingParams, ServeSpec

    base = base_model()
    folders = {hashlib.sha256(f"a{i}".encode()).hexdigest(): folder / f"a{i}" for i in range(n)}
    refs = [
        AdapterRef(
            digest=digest,
            name=path.name,
            version=1,
            method="lora",
            base_fingerprint=base.fingerprint,
            context_length=base.config.max_position_embeddings,
            nbytes=sum(f.stat().st_size for f in path.iterdir()),
        )
        for digest, path in folders.items()
    ]
    spec = ServeSpec(base=base.name, pool_bytes=2 << 30, max_num_seqs=num_requests, max_num_batched_tokens=2048)
    engine = build_engine(spec, base, lambda ref: read_adapter(folders[ref.digest], base.config))
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)

    def once() -> float:
        begun = time.perf_counter()
        for i, ids in enumerate(_prompts(num_requests)):
            engine.add(GenerateRequest(str(i), tuple(ids), params, refs[i % n] if n else None))
        while engine.has_work:
            engine.step()
        return time.perf_counter() - begun

    once()
    return once()


def _run_peft(folder: Path, n: int, num_requests: int) -> float:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base_model().path, dtype=torch.bfloat16)
    options: dict[str, Any] = {}
    if n:
        model = PeftModel.from_pretrained(model, folder / "a0", adapter_name="a0")
        for i in range(1, n):
            model.load_adapter(folder / f"a{i}", adapter_name=f"a{i}")
        options["adapter_names"] = [f"a{i % n}" for i in range(num_requests)]
    model.eval()
    ids = torch.tensor(_prompts(num_requests))
    options |= {"attention_mask": torch.ones_like(ids), "do_sample": False}
    options |= {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}

    def once() -> float:
        begun = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(input_ids=ids, **options)
        assert out.shape[1] == PROMPT_TOKENS + NEW_TOKENS
        return time.perf_counter() - begun

    once()
    return once()


if __name__ == "__main__":
    main()
