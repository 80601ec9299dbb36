"""Answers of the base and of all adapters to a task's questions, from one engine in one batch; printed as JSON.

    python -m examples.quality.answers HOME BASE QUESTIONS_JSON

The file holds {"prompts": […], "max_tokens": N, "adapters": [folder, …]}. The result is {"answers": […]} with one list
of texts for the base, then one for each adapter. Decoding is greedy, in bf16.
"""

from __future__ import annotations

import json
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks.stepping import finish
from loray.adapters.manifest import describe, digest
from loray.adapters.peft_format import read_adapter
from loray.bases.registry import BaseModel, get_base
from loray.engine.build import build_engine
from loray.spec import AdapterRef, GenerateRequest, SamplingParams, ServeSpec

POOL_BYTES = 1 << 30
_AT_ONCE = 64


def main(home: Path, name: str, prompts: list[str], max_tokens: int, folders: list[str]) -> dict[str, Any]:
    base = get_base(home, name)
    tokenizer = AutoTokenizer.from_pretrained(base.path)
    refs = [None, *(_reference(Path(folder), base) for folder in folders)]
    weights = {ref.digest: folder for ref, folder in zip(refs[1:], folders, strict=True) if ref is not None}
    num_requests = len(refs) * len(prompts)
    spec = ServeSpec(
        base=name,
        pool_bytes=POOL_BYTES,
        max_num_seqs=_AT_ONCE,
        max_queued=num_requests,
        max_loading=num_requests,
        enable_prefix_caching=False,
    )
    engine = build_engine(
        spec, base, lambda ref, packer: packer.pack(read_adapter(Path(weights[ref.digest]), base.config))
    )
    params = SamplingParams(max_tokens=max_tokens, temperature=0)
    tokens: dict[str, list[int]] = {f"{a}/{q}": [] for a in range(len(refs)) for q in range(len(prompts))}
    with closing(engine):
        for q, ids in enumerate(tokenizer(prompts)["input_ids"]):
            for a, ref in enumerate(refs):
                engine.add(GenerateRequest(f"{a}/{q}", tuple(ids), params, ref))
        for output in finish(engine):
            if output.token_id is not None:
                tokens[output.request_id].append(output.token_id)
    texts = {key: str(tokenizer.decode(ids, skip_special_tokens=True)) for key, ids in tokens.items()}
    return {"answers": [[texts[f"{a}/{q}"] for q in range(len(prompts))] for a in range(len(refs))]}


def _reference(folder: Path, base: BaseModel) -> AdapterRef:
    manifest = describe(folder, base)
    return manifest.ref(digest(manifest), folder.name, version=1)


if __name__ == "__main__":
    home, name, file = sys.argv[1:]
    asked = json.loads(Path(file).read_text(encoding="utf-8"))
    found = main(Path(home), name, asked["prompts"], asked["max_tokens"], asked["adapters"])
    sys.stdout.write(json.dumps(found) + "\n")
