"""What is computed, as golden files: published adapters of each method and their other forms, tokens, training steps.

The base and the adapters are made of numbers that are equal on every machine. Adapters are multiples of 1/64, so that
their products and sums are exact in any order; what still depends on the order is compared with a tolerance.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from loray.adapters.manifest import ManifestDetails
from loray.bases.registry import BaseModel, add_base
from loray.catalog import AdapterVersion, Catalog
from loray.files import file_sha256
from loray.methods.dora_module import DoraLinear
from loray.publishing import Destination, import_folder, publish
from loray.publishing.convert import convert_to_lora, merge_into_base, save_as_gguf
from loray.recipes.resolve import resolve
from loray.spec import (
    ATTENTION_MODULES,
    AdapterManifest,
    Constraint,
    Evaluation,
    GenerateRequest,
    Limits,
    SamplingParams,
    TokenDelta,
    TrainSpec,
)
from loray.store import AdapterStore, open_store
from loray.text.detokenizer import RequestText
from loray.text.tokenizer import Tokenizer
from loray.train.checkpoint import FolderReporter, save_adapter
from loray.train.data.rows import load_data
from loray.train.loop import train
from loray.train.model import build_model
from tests.fixtures.engines import make_engine, submit
from tests.fixtures.peft_adapters import TestAdapter
from tests.fixtures.tiny import byte_tokenizer, write_checkpoint
from tests.golden.frozen import FOLDER

ADAPTERS = FOLDER / "adapters"  # as they were published, in folders of their methods
BACKUP = FOLDER / "catalog.backup"
_PUBLISHED_AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
_CHANGED_ROWS = 30  # of LongLoRA's embedding: few enough for rows to be published, not the whole


def make_base(folder: Path, **config: Any) -> BaseModel:
    """The base of all adapters, or with `config` another one."""
    return add_base(str(write_checkpoint(folder / "checkpoint", **config)), home=folder / "home", name="tiny")


# -- published adapters -----------------------------------------------------------------------------------------------

_METHODS: Mapping[str, dict[str, Any]] = {
    "lora": {"adapter": {"method": "lora", "rank": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}},
    "dora": {"adapter": {"method": "dora", "rank": 2, "alpha": 4, "target_modules": ["q_proj", "o_proj"]}},
    "vera": {
        "adapter": {"method": "vera", "rank": 8, "projection_prng_key": 3, "target_modules": ["q_proj", "v_proj"]}
    },
    "longlora": {
        "adapter": {"method": "longlora", "rank": 2, "alpha": 4},
        "rope_scaling": {"type": "linear", "factor": 2},
    },
}


def _recipe(fields: Mapping[str, Any]) -> TrainSpec:
    rest: dict[str, Any] = {"name": "golden"}
    rest |= {"base": "tiny", "data": {"train": "data.jsonl", "max_length": 64}, "dtype": "float32"}
    rest |= {"batch": {"rows": 2, "accumulation": 2}, "optimizer": {"learning_rate": 5e-3}, "max_steps": 20}
    return TrainSpec.parse(rest | dict(fields), source="golden")


@dataclass(frozen=True)
class Published:
    """The adapters of all methods by name, in a store and a catalog of their own."""

    base: BaseModel
    store: AdapterStore
    catalog: Catalog
    versions: Mapping[str, AdapterVersion]


@contextmanager
def published(base: BaseModel, folder: Path) -> Iterator[Published]:
    """Make an adapter of each method, and publish it."""
    store = AdapterStore(open_store(f"file://{folder}/store"))
    catalog = Catalog(f"sqlite:///{folder}/catalog.db")
    try:
        versions = {method: _publish(method, base, folder / method, store, catalog) for method in _METHODS}
        yield Published(base, store, catalog, versions)
    finally:
        catalog.close()


def _publish(method: str, base: BaseModel, folder: Path, store: AdapterStore, catalog: Catalog) -> AdapterVersion:
    spec = _recipe(_METHODS[method])
    resolved, model = resolve(spec, base.config), build_model(base, spec)
    with torch.no_grad():
        trained = [(name, p) for name, p in sorted(model.named_parameters()) if p.requires_grad]
        for number, (name, parameter) in enumerate(trained):
            _fill(name, parameter, _numbers(parameter.shape, number))
        for module in model.modules():
            if isinstance(module, DoraLinear):  # so that its magnitudes are 1 + numbers
                module.initial_square_O.fill_(1)
    save_adapter(model, spec.adapter, folder)
    details = ManifestDetails(
        recipe=spec,
        dtype_reason="the recipe says so",
        job_id="job-1",
        data_fingerprint="d" * 64,
        evaluations=[Evaluation(metric="loss", value=1.5, dataset="held-out", context_length=64)],
        licence="CC0-1.0",
        description=f"An adapter by {method}.",
        rope_parameters=resolved.rope,
        context_length=resolved.context,
        created_at=_PUBLISHED_AT,
    )
    aliases = () if method == "longlora" else ("prod",)  # which the gate does not give unmeasured
    return publish(folder, base, Destination(method, store, catalog, aliases), details)


def _numbers(shape: Sequence[int], seed: int) -> Tensor:
    """Multiples of 1/64 between −15/64 and 15/64, in an order without a pattern that a matrix's rank would show."""
    n = torch.arange(torch.Size(shape).numel())
    return (((n * n * n + (2 * seed + 3) * n + 7 * seed) % 31 - 15).float() / 64).reshape(tuple(shape))


def _fill(name: str, parameter: Tensor, numbers: Tensor) -> None:
    if "embed_tokens" in name:
        parameter[:_CHANGED_ROWS] += numbers[:_CHANGED_ROWS]
    elif name.endswith("norm.weight"):
        parameter.copy_(1 + numbers)
    elif "lambda_d" in name:
        parameter.copy_(0.25 + numbers)
    elif "lambda_b" in name:
        parameter.copy_(4 * numbers)
    else:
        parameter.copy_(numbers)


def adapters_text(made: Published) -> str:
    """Manifest and files of each adapter, the store's keys, and the adapter that VeRA's is converted to."""
    keys = sorted(made.store.objects.list())
    lora = convert_to_lora(made.versions["vera"].ref, made.base, Destination("vera-as-lora", made.store, made.catalog))
    found = {name: _described(version) for name, version in (*made.versions.items(), ("vera as lora", lora))}
    for field in ("digest", "created_at"):  # the time of its files, and so its digest
        del found["vera as lora"][field]
    return json.dumps(found | {"store": keys}, indent=1, sort_keys=True) + "\n"


def _described(version: AdapterVersion) -> dict[str, Any]:
    manifest = version.manifest.model_dump(mode="json", exclude_none=True)
    return {"digest": version.digest, "method": version.ref.method, **manifest}


def keep_adapters(folder: Path) -> None:
    """Keep the adapters that `published` made below `folder`."""
    shutil.rmtree(ADAPTERS, ignore_errors=True)
    for method in _METHODS:
        shutil.copytree(folder / method, ADAPTERS / method)


def read_kept(base: BaseModel, store: AdapterStore, catalog: Catalog) -> dict[str, AdapterVersion]:
    """Import the kept adapters."""
    return {m: import_folder(ADAPTERS / m, base, Destination(m, store, catalog)) for m in _METHODS}


# -- other forms ------------------------------------------------------------------------------------------------------


def forms(made: Published, folder: Path) -> dict[str, Any]:
    """Adapters as other tools take them: SHA-256 of GGUF files; merged tensors as their types, shapes and sums."""
    found: dict[str, Any] = {}
    for method, version in made.versions.items():
        if method in ("lora", "vera"):  # GGUF has no more than linear modules
            file = folder / f"{method}.gguf"
            save_as_gguf(version.ref, file, base=made.base, store=made.store)
            found[f"{method}.gguf"] = file_sha256(file)
        merged = folder / f"{method}-merged"
        merge_into_base(version.ref, merged, base=made.base, store=made.store)
        found[f"{method} merged"] = _sums(load_file(merged / "model.safetensors"))
    return found


def _sums(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Of each tensor its type, its shape, the sum of its magnitudes, and a sum in which places count."""
    return {name: _sum(tensor) for name, tensor in sorted(tensors.items())}


def _sum(tensor: Tensor) -> list[Any]:
    x = tensor.double().flatten()
    places = torch.arange(len(x)) % 7 + 1
    totals = [float(f"{total:.6g}") for total in (x.abs().sum().item(), (x.abs() * places).sum().item())]
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), *totals]


# -- tokens -----------------------------------------------------------------------------------------------------------

_NUM_REQUESTS, _MAX_TOKENS = 64, 16
_LETTERS = tuple(range(64, 90))  # the tokens of a to z
# Twelve kinds and five models: each kind comes with each model.
_KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {},
    {"temperature": 0.8, "top_k": 20},
    {"temperature": 1.3, "top_p": 0.9},
    {"top_k": 40, "top_p": 0.8, "min_p": 0.02},
    {"temperature": 0.9, "repetition_penalty": 1.2},
    {"temperature": 0.0, "presence_penalty": 0.6, "frequency_penalty": 0.3},
    {"logit_bias": {5: 4.0, 77: -100.0, 200: 2.5}},
    {"logit_bias": dict.fromkeys(_LETTERS, 8.0), "stop": ("e", "at", "no"), "min_tokens": 2},
    {"stop_token_ids": tuple(range(0, 320, 9)), "ignore_eos": True},
    {"allowed_token_ids": _LETTERS, "bad_words": ((64,), (65, 66)), "min_tokens": 3},
    {"structured": Constraint.from_regex("[a-f]{4,12}")},
)


def kept_adapters() -> list[TestAdapter]:
    """The kept adapters as the tests' engines take them."""
    found = []
    for method in _METHODS:
        manifest = AdapterManifest.model_validate_json((ADAPTERS / method / AdapterManifest.FILE).read_bytes())
        ref = manifest.ref(manifest.files["adapter_model.safetensors"], method, 1)
        found.append(TestAdapter(ref, ADAPTERS / method, manifest.rope_parameters))
    return found


def tokens(base: BaseModel, *, num_ranks: int = 1) -> dict[str, Any]:
    """What an engine of so many ranks answers to seeded requests of all methods and sampling modes, side by side."""
    adapters = kept_adapters()
    requests = _requests(adapters)
    engine = make_engine(base, adapters, tensor_parallel_size=num_ranks, num_threads=1)
    try:
        submit(engine, requests)
        deltas: dict[str, list[TokenDelta]] = {}
        while engine.has_work:
            for output in engine.step():
                if output.error is not None:
                    raise output.error
                deltas.setdefault(output.request_id, []).append(output.delta)
            if engine.idle:
                time.sleep(0.001)  # grammars are compiled by threads
        engine.check_integrity()
    finally:
        engine.close()
    tokenizer = Tokenizer.load(base.path)
    return {r.request_id: _answer(tokenizer, r, deltas[r.request_id]) for r in requests}


def _requests(adapters: Sequence[TestAdapter]) -> list[GenerateRequest]:
    rng = random.Random(0)
    models = (None, *(adapter.ref for adapter in adapters))
    found = []
    for i in range(_NUM_REQUESTS):
        prompt, model, kind = rng.choices(range(256), k=3 + 5 * i % 47), models[i % len(models)], i % len(_KINDS)
        params = SamplingParams(max_tokens=_MAX_TOKENS, seed=i, **_KINDS[kind])
        name = f"{i}: {model.name if model else 'base'}, kind {kind}"
        found.append(GenerateRequest(name, tuple(prompt), params, model))
    return found


def _answer(tokenizer: Tokenizer, request: GenerateRequest, deltas: Sequence[TokenDelta]) -> list[Any]:
    """(token ids, finish reason, text)"""
    text, written, reason = RequestText(tokenizer, request), "", None
    ids: list[int] = []
    for delta in deltas:
        pushed = text.push(delta)
        ids += pushed.token_ids
        written += pushed.text
        if (reason := pushed.finish_reason) is not None:
            break
    return [ids, reason, written]


# -- training steps ---------------------------------------------------------------------------------------------------

_ATTENTION = {"target_modules": ATTENTION_MODULES}
_RUNS: Mapping[str, dict[str, Any]] = {
    "lora": {"adapter": {"method": "lora", "rank": 4, **_ATTENTION}},
    "dora": {
        "adapter": {"method": "dora", "rank": 4, **_ATTENTION},
        "batch": {"rows": 2, "accumulation": 2, "order": "packed"},
    },
    "vera": {"adapter": {"method": "vera", "rank": 16, **_ATTENTION}, "optimizer": {"learning_rate": 5e-2}},
    "longlora": {
        "adapter": {"method": "longlora", "rank": 4},
        "rope_scaling": {"factor": 2, "original_context": 32},
        "attention": {"type": "s2", "group_size": 16},
    },
    "dpo": {
        "adapter": {"method": "lora", "rank": 4, **_ATTENTION},
        "objective": {"type": "dpo"},
        "optimizer": {"learning_rate": 1e-3},
    },
}


def steps(base: BaseModel, folder: Path) -> dict[str, Any]:
    """Twenty steps of each method, and of DPO: figures of every step, held-out losses, and the adapter's sums."""
    return {name: _steps(fields, base, folder / name) for name, fields in _RUNS.items()}


def _steps(fields: Mapping[str, Any], base: BaseModel, folder: Path) -> dict[str, Any]:
    folder.mkdir(parents=True)
    data = {"train": str(folder / "data.jsonl"), "eval_fraction": 0.2, "max_length": 64, "format": "raw"}
    spec = _recipe({"data": data} | dict(fields))
    rows = [_pair(i) if spec.is_paired else {"text": _progression(i)} for i in range(40)]
    (folder / "data.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    options: dict[str, Any] = {"max_length": 64, "max_eval_rows": 6, "seed": spec.seed}
    dataset = load_data(spec.data, byte_tokenizer(), formats=spec.objective.formats, **options)
    reporter = FolderReporter(folder / "checkpoints")
    train(spec, base, dataset, reporter=reporter, workdir=folder)
    done = [event for event in reporter.events if event["event"] == "step"]
    found: dict[str, Any] = {
        name: [_rounded(event[name]) for event in done] for name in ("loss", "grad_norm", "lr", "num_tokens")
    }
    found["eval_loss"] = [_rounded(event["eval_loss"]) for event in reporter.events if event["event"] == "eval"]
    (file,) = reporter.checkpoints[-1].path.rglob("adapter_model.safetensors")
    return found | {"adapter": _sums(load_file(file))}


def _rounded(value: float) -> float:
    return round(value, 5)


def _progression(i: int) -> str:
    """A text of letters in steps of one to three."""
    return "".join(chr(97 + (i + t * (1 + i % 3)) % 26) for t in range(20 + (7 * i) % 44))


def _pair(i: int) -> dict[str, str]:
    """Letters that go on in order are better than those that go back."""
    letters = [chr(97 + (i + t) % 26) for t in range(40)]
    first, rest = letters[: 4 + i % 5], letters[4 + i % 5 :]
    return {
        "prompt": "".join(first),
        "chosen": "".join(rest[: 6 + i % 7]),
        "rejected": "".join([*reversed(first), *rest[: i % 4]]),
    }


# -- the catalog's backup ---------------------------------------------------------------------------------------------


def write_backup(made: Published, path: Path) -> None:
    """Fill the catalog's tables beside those of adapters, and write its backup."""
    catalog = made.catalog
    catalog.tenants.create("acme", Limits(rpm_limit=600))
    catalog.keys.create("team", scopes=["infer"], tenant="acme")
    catalog.adapters.share("dora", "shared", ["acme"])
    catalog.jobs.add("job-1", name="lora", recipe=_recipe(_METHODS["lora"]))
    catalog.evaluations.record(
        made.versions["lora"].digest, [Evaluation(metric="loss", value=1.25, dataset="documents")]
    )
    catalog.removal.delete_adapter("vera")
    catalog.backup.write(path)


def backup_rows(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of a backup by table, each with its columns' names."""
    found: dict[str, list[dict[str, Any]]] = {}
    columns: list[str] = []
    table = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        content = json.loads(line)
        if isinstance(content, list):
            found[table].append(dict(zip(columns, content, strict=True)))
        elif "table" in content:
            table, columns = content["table"], content["columns"]
            found[table] = []
    return found
