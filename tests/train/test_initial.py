"""A run that starts from another one's adapter: at its loss, under its RoPE, resumed without it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from jobs.driver.prepare import check_initial
from loray.adapters.peft_format import read_adapter
from loray.bases.registry import BaseModel
from loray.errors import SpecError
from loray.methods.attach import InitialAdapter
from loray.recipes.defaults import defaults_of
from loray.spec import Method
from loray.train.checkpoint import ADAPTER, FolderReporter, save_adapter
from loray.train.data.rows import load_data
from loray.train.loop import train
from tests.fixtures.adapters import ADAPTERS, in_peft, trained
from tests.fixtures.adapters import recipe as adapter_recipe
from tests.fixtures.tiny import byte_tokenizer
from tests.train.test_loop import METHODS, TINY, curve, make_data, masters, recipe, run


@pytest.mark.parametrize("method", list(METHODS))
def test_it_starts_where_the_other_ended(method: str, tiny_base: Callable[..., BaseModel], tmp_path: Path) -> None:
    base = tiny_base(**TINY)
    _, first = run(recipe(method, max_steps=6), base, tmp_path, name="first")
    folder = first.checkpoints[-1].path / ADAPTER
    spec = recipe(method, max_steps=4, seed=3, init_adapter="first@1", checkpoint={"interval_steps": 2})
    data, initial = make_data(tmp_path, spec), InitialAdapter("0" * 64, folder)
    reporter = FolderReporter(tmp_path / "second", keep=9)
    state = train(spec, base, data, reporter=reporter, workdir=tmp_path, initial=initial)

    (parent,) = state.baselines
    like = trained(base, spec).config
    assert parent.subject == "parent"
    assert parent.value == pytest.approx(_loss(base, like, folder, data.evaluation), rel=1e-5)
    assert state.parent == "0" * 64

    again = FolderReporter(tmp_path / "again", keep=9)
    resume_from = reporter.checkpoints[0].path
    train(spec, base, data, reporter=again, workdir=tmp_path, initial=initial, resume_from=resume_from)
    assert curve(again) == curve(reporter)[2:]
    assert all(torch.equal(t, masters(reporter)[n]) for n, t in masters(again).items())
    with pytest.raises(SpecError, match="init_adapter is first@1: the files of an adapter go with it"):
        train(spec, base, data, reporter=again, workdir=tmp_path)


@pytest.mark.parametrize("method", ["lora", "longlora"])
def test_at_the_default_rate_stage_two_beats_stage_one_on_its_own_rows(
    method: Method, tiny_base: Callable[..., BaseModel], tmp_path: Path
) -> None:
    """Alphabets forward, then backward: the loss of the parent on backward ones is that of stage one."""
    base = tiny_base(**TINY)
    new, on = (
        recipe(method, max_steps=20, optimizer={"learning_rate": default.value, "warmup_ratio": 0.05}, **fields)
        for default, fields in (
            (defaults_of(method)["optimizer.learning_rate"], {}),
            (defaults_of(method, is_continued=True)["optimizer.learning_rate"], {"init_adapter": "first@1"}),
        )
    )
    _, first = run(new, base, tmp_path, name="first")
    texts = ["".join(chr(122 - (i + t) % 26) for t in range(20 + i)) for i in range(40)]
    (tmp_path / "back.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = on.data.model_copy(update={"train": str(tmp_path / "back.jsonl")})
    data = load_data(source, byte_tokenizer(), max_length=64, max_eval_rows=8, seed=0)
    initial = InitialAdapter("0" * 64, first.checkpoints[-1].path / ADAPTER)
    reporter = FolderReporter(tmp_path / "second")
    state = train(on, base, data, reporter=reporter, workdir=tmp_path, initial=initial)
    (parent,) = state.baselines
    assert state.eval_loss is not None
    assert state.eval_loss < 0.99 * parent.value


def _loss(base: BaseModel, config: Any, folder: Path, rows: Any) -> float:
    """Of PEFT's model with the adapter in `folder`."""
    model = in_peft(base, type("Like", (), {"config": config}), folder)
    total, num_targets = 0.0, 0
    for i in range(len(rows)):
        ids = torch.tensor(rows.row(i)[0].astype("int64"))[None]
        num_targets += ids.shape[1] - 1
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        total += float(nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
    return total / num_targets


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("rslora", {"use_rslora": False}, "its update is scaled by 1.5"),
        ("vera", {"projection_prng_key": 4}, r"random pair is another one \(projection_prng_key\)"),
        ("vera", {"rank": 8}, "its rank is 24"),
        ("vera", {"method": "lora"}, "its method is vera"),
    ],
)
def test_what_differs_is_named(
    tiny_base: Callable[..., BaseModel], tmp_path: Path, name: str, fields: dict[str, Any], message: str
) -> None:
    base, spec = tiny_base(), adapter_recipe(ADAPTERS[name])
    save_adapter(trained(base, spec), spec.adapter, tmp_path)
    weights = read_adapter(tmp_path, base.config)
    check_initial(spec.adapter, weights, base.config, "first@1")
    changed = {k: v for k, v in ADAPTERS[name]["adapter"].items() if "prng" not in k or fields.keys() != {"method"}}
    other = adapter_recipe({"adapter": changed | fields})
    with pytest.raises(SpecError, match=f"init_adapter first@1 is another adapter .*{message}"):
        check_initial(other.adapter, weights, base.config, "first@1")
