"""Dense perplexity against a window-by-window oracle in fp64; documents and their windows."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import exp
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as papq
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, VeraConfig
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from loray.bases.registry import BaseModel
from loray.errors import BaseMismatch, DataError, EvaluationError
from loray.spec import PerplexitySpec, RopeParameters
from loray.train import objectives
from loray.train.attention import attend
from loray.train.checkpoint import save_adapter
from loray.train.evaluation import perplexity as module
from loray.train.evaluation.documents import cut_windows, read_documents
from loray.train.evaluation.measure import MeasuredModel, load, measure, subjects
from loray.train.evaluation.perplexity import Measured, mean_loss
from loray.train.model import build_model
from tests.fixtures.models import model_recipe
from tests.fixtures.peft_adapters import NORMS, make_adapter
from tests.fixtures.tiny import byte_tokenizer
from tests.fixtures.training_data import documents

LINEAR = RopeParameters(rope_type="linear", rope_theta=10000.0, factor=2)
CPU = torch.device("cpu")


def naive_loss(
    base: BaseModel,
    ids_N: Any,
    context: int,
    stride: int,
    rope: RopeParameters | None = None,
    folder: Path | None = None,
) -> float:
    """Each window by itself, its whole logits, in fp64 with eager attention."""
    config = AutoConfig.from_pretrained(base.path)
    if rope is not None:
        config.rope_parameters = rope.to_hf()
    model = AutoModelForCausalLM.from_pretrained(
        base.path, config=config, dtype=torch.float64, attn_implementation="eager"
    )
    if folder is not None:
        model = PeftModel.from_pretrained(model, folder).to(torch.float64)
    losses = []
    with torch.no_grad():
        for ids in ids_N:
            for start in range(0, len(ids) - context + 1, stride):
                window_T = torch.from_numpy(ids[start : start + context]).long()
                logits_TV = model.eval()(input_ids=window_T[None], use_cache=False).logits[0]
                losses.append(float(F.cross_entropy(logits_TV[:-1], window_T[1:])))
    return sum(losses) / len(losses)


@pytest.fixture(scope="module")
def base(tiny_base: Callable[..., BaseModel]) -> BaseModel:
    return tiny_base(std=0.05, num_hidden_layers=3)


@pytest.mark.parametrize("tokens_at_once", [64, 4096], ids=["one window a pass", "all in one"])
@pytest.mark.parametrize("rope", [None, LINEAR], ids=["as it is", "scaled"])
def test_it_is_the_mean_over_all_windows(
    base: BaseModel, rope: RopeParameters | None, tokens_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MEASURED_AT_ONCE", tokens_at_once)
    found = documents(200, 40, 131)
    windows = cut_windows(found, 64, stride=24, max_windows=None)
    model = load(base, MeasuredModel("base", rope), dtype="float32", device=CPU)
    expected = naive_loss(base, found.ids_N, 64, 24, rope)
    assert mean_loss(lambda: model, windows) == pytest.approx(expected, rel=1e-6)
    assert len(windows) == 6 + 0 + 3


@pytest.mark.parametrize(
    ("config", "rope", "std"),
    [
        (LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), None, 0.4),
        (LoraConfig(r=4, target_modules=["q_proj", "k_proj"], modules_to_save=["embed_tokens", *NORMS]), LINEAR, 0.4),
        (VeraConfig(r=8, target_modules=["q_proj", "o_proj"], save_projection=False), None, 2.0),
    ],
    ids=["lora", "longlora", "vera"],
)
def test_every_method_is_what_peft_makes_of_it(
    base: BaseModel, config: Any, rope: RopeParameters | None, std: float, tmp_path: Path
) -> None:
    make_adapter(base, tmp_path / "adapter", config, seed=1, rope=rope, std=std)
    found = documents(150)
    spec = PerplexitySpec(context_lengths=(64, 100), stride=40, max_windows=None)
    chosen = subjects(rope, tmp_path / "adapter", compare=True)
    measured = measure(base, chosen, documents=found, perplexity=spec, dtype="float32")
    kinds = ["base", *(["base_scaled"] if rope else []), "adapter"]
    assert [(e.subject, e.context_length) for e in measured] == [(kind, n) for kind in kinds for n in (64, 100)]
    ropes, folders = {"base": None}, {"adapter": tmp_path / "adapter"}
    for e in measured:
        assert (e.metric, e.stride, e.count, e.data_sha256) == (
            "perplexity",
            40,
            {64: 3, 100: 2}[e.context_length or 0],
            "0" * 64,
        )
        loss = naive_loss(
            base, found.ids_N, e.context_length or 0, 40, ropes.get(e.subject, rope), folders.get(e.subject)
        )
        assert e.value == pytest.approx(exp(loss), rel=1e-5), e
    values = {e.subject: e.value for e in measured if e.context_length == 64}
    assert abs(values["adapter"] / values["base"] - 1) > 0.005, "the adapter does next to nothing: nothing is shown"


def test_a_model_in_training_is_measured_dense_and_left_as_it_was(base: BaseModel) -> None:
    spec = model_recipe(original=128, group_size=16)
    model = build_model(base, spec).train()
    found = documents(300)
    loss = mean_loss(lambda: Measured(model), cut_windows(found, 256, stride=44, max_windows=None))
    assert loss == pytest.approx(naive_loss(base, found.ids_N, 256, 44, LINEAR), rel=1e-6)
    assert model.training
    assert model.config._attn_implementation == "s2_attn"


@pytest.mark.parametrize("tied", [False, True])
def test_what_is_published_is_measured_as_what_was_trained(
    tiny_base: Callable[..., BaseModel], tied: bool, tmp_path: Path
) -> None:
    """Norms and embedding too: rows where the head is not tied to it, a copy beside the head where it is."""
    base = tiny_base(tie_word_embeddings=tied, std=0.05)
    spec = model_recipe()
    trained = build_model(base, spec)
    with torch.no_grad():
        trained.get_input_embeddings().weight[:30] += 0.5
        trained.model.norm.weight.mul_(1.3)
    save_adapter(trained, spec.adapter, tmp_path)
    windows = cut_windows(documents(200), 64, stride=32, max_windows=None)
    rope = RopeParameters(**trained.config.rope_parameters)
    loaded, plain = (
        load(base, MeasuredModel("adapter", rope, folder), dtype="float32", device=CPU) for folder in (tmp_path, None)
    )
    loss = mean_loss(lambda: Measured(trained), windows)
    assert mean_loss(lambda: loaded, windows) == pytest.approx(loss, rel=1e-6)
    assert abs(mean_loss(lambda: plain, windows) - loss) > 1e-3


def test_no_mask_and_no_logits_of_all_positions(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long window must not cost memory in its square, nor positions times vocabulary."""
    rows, products = [], []
    attention, loss = attend.causal_forward, objectives.cross_entropy

    def spied(q_FRLD: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        rows.append(q_FRLD.shape[2])
        return attention(q_FRLD, *others)

    monkeypatch.setattr(attend, "causal_forward", spied)  # which has no mask
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *_, **__: pytest.fail("attention with a mask"))
    monkeypatch.setattr(objectives, "cross_entropy", lambda *args: products.append(args[0].shape) or loss(*args))
    model = load(base, MeasuredModel("base"), dtype="bfloat16", device=CPU)
    monkeypatch.setattr(model.model, "forward", lambda *_, **__: pytest.fail("computed the logits of every position"))
    mean_loss(lambda: model, cut_windows(documents(512), 512, stride=1, max_windows=None))
    assert rows == [512] * 3
    assert products == [(511, 64)]


def test_a_loss_that_is_not_finite_is_an_error(base: BaseModel) -> None:
    model = load(base, MeasuredModel("base"), dtype="float32", device=CPU)
    model.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(EvaluationError, match="windows of 64 tokens is nan"):
        mean_loss(lambda: model, cut_windows(documents(64), 64, stride=1, max_windows=None))


def test_a_loss_beyond_all_numbers_is_an_error(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loray.train.evaluation.measure.mean_loss", lambda *_: 900.0)
    with pytest.raises(EvaluationError, match="base, perplexity at 64 tokens is inf"):
        measure(
            base,
            [MeasuredModel("base")],
            dtype="float32",
            documents=documents(64),
            perplexity=PerplexitySpec(context_lengths=(64,)),
        )


def test_an_adapter_of_another_base_is_refused(
    base: BaseModel, tiny_base: Callable[..., BaseModel], peft_folder: Callable[..., Path]
) -> None:
    folder = peft_folder(tiny_base(hidden_size=32))
    with pytest.raises(BaseMismatch, match="for another base model"):
        load(base, MeasuredModel("adapter", None, folder), dtype="float32", device=CPU)


# -- documents --------------------------------------------------------------------------------------------------------


def test_windows_are_spread_over_all_documents() -> None:
    found = documents(1000, 50, 300)
    for max_windows, expected in ((None, 13 + 0 + 3), (4, 4), (1, 1), (99, 16)):
        windows = cut_windows(found, 100, stride=75, max_windows=max_windows)
        assert len(windows) == expected
    first, *_, last = cut_windows(found, 100, stride=75, max_windows=4)
    np.testing.assert_array_equal(first, found.ids_N[0][:100])
    np.testing.assert_array_equal(last, found.ids_N[2][150:250])
    whole = cut_windows(found, 300, stride=1 << 20, max_windows=None)
    assert [len(ids) for ids in whole] == [300, 300]
    with pytest.raises(DataError, match=r"no document of random has 1,001 tokens, the longest has 1,000"):
        cut_windows(found, 1001, stride=1, max_windows=None)


def test_every_kind_of_file_gives_the_same_documents(tmp_path: Path) -> None:
    rows = [{"text": "first document", "split": "train"}, {"text": "second, höher", "split": "eval"}]
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    papq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    (tmp_path / "d.txt").write_text(rows[1]["text"])
    tokenizer = byte_tokenizer()
    texts = {}
    for source in ("d.jsonl", "d.parquet"):
        found = read_documents(str(tmp_path / source), tokenizer)
        texts[source] = [tokenizer.decode(ids, skip_special_tokens=True) for ids in found.ids_N]
        assert found.name == source
    assert texts["d.jsonl"] == texts["d.parquet"] == [row["text"] for row in rows]
    only = [
        read_documents(str(tmp_path / "d.jsonl"), tokenizer, where={"split": "eval"}),
        read_documents(str(tmp_path / "d.parquet"), tokenizer, where={"split": "eval"}),
        read_documents(str(tmp_path / "d.txt"), tokenizer),
    ]
    assert [found.name for found in only] == ["d.jsonl, split=eval", "d.parquet, split=eval", "d.txt"]
    assert len({found.sha256 for found in only}) == 1
    assert only[0].sha256 != read_documents(str(tmp_path / "d.jsonl"), tokenizer).sha256
    short = read_documents(str(tmp_path / "d.jsonl"), tokenizer, max_tokens=20)
    assert ([len(ids) for ids in short.ids_N], short.num_tokens, short.longest) == ([15, 5], 20, 15)


@pytest.mark.parametrize(
    ("content", "where", "message"),
    [
        ("", {}, "is empty; give a file with at least one row"),
        ('{"text": "a"}\n{"text"', {}, "line 2: not valid JSON"),
        ('{"prompt": "a", "completion": "b"}\n', {}, "line 1: the row has no `text` but prompt, completion"),
        ('{"text": "a"}\n', {"split": "x"}, "line 1: the row has no `split`"),
        ('{"text": "a", "split": "y"}\n', {"split": "x"}, "has no document where split=x"),
        ('["text"]\n', {}, "row 1: a row must be an object"),
        ('{"text": 3}\n', {}, "`text` must be a string in every row, not int"),
        (b"\xff\xfe{", {}, "neither JSON, Parquet nor .*utf-8"),
        (b"PAR1 and then nothing of the kind", {}, "is not a readable Parquet file"),
    ],
)
def test_bad_documents_are_named(tmp_path: Path, content: str | bytes, where: dict[str, str], message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        read_documents(str(path), byte_tokenizer(), where=where)
    with pytest.raises(DataError, match="is not a file"):
        read_documents(str(tmp_path / "missing.jsonl"), byte_tokenizer())
