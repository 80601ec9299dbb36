"""aLoRA: active where PEFT has it active, also in packed rows; trained on what follows its invocation; served so."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from loray.adapters.manifest import ManifestDetails, describe, manifest_json
from loray.adapters.manifest import digest as digest_of
from loray.bases.registry import BaseModel
from loray.errors import DataError, SpecError
from loray.methods import METHODS
from loray.methods.alora_module import find_active
from loray.spec import AloraSpec, TrainSpec
from loray.train.checkpoint import ADAPTER, FolderReporter, save_adapter
from loray.train.data.batches import collate, pack_rows
from loray.train.data.rows import Dataset
from loray.train.loop import train
from loray.train.model import build_model
from loray.train.objectives import batch_loss
from tests.fixtures.adapters import BaseFactory
from tests.fixtures.adapters import recipe as adapter_recipe
from tests.fixtures.engines import Spy, make_engine, request, run
from tests.fixtures.models import strengthen
from tests.fixtures.peft_adapters import TestAdapter
from tests.fixtures.tiny import byte_tokenizer
from tests.fixtures.training import recipe
from tests.fixtures.training_data import END, TOKENIZER, jsonl, learned, load, whole

INVOCATION = tuple(TOKENIZER("<|im_start|>a", add_special_tokens=False).input_ids)  # as the template's answers begin
START, A = INVOCATION
SPEC = AloraSpec(rank=4, alpha=8, invocation_tokens=INVOCATION)
ROWS = [
    [5, 6, *INVOCATION, 7, 8, 9, *INVOCATION, 10],
    [*INVOCATION, 11],
    [12, 13, START, 14],
    [15, *INVOCATION],
    [A, 16, START],
    [A, 17, *INVOCATION, 18, 19],
]


def place_of(row: list[int]) -> int:
    """Where PEFT turns it on; the row's length if nowhere."""
    starts = [i for i in range(len(row)) if tuple(row[i : i + 2]) == INVOCATION]
    return starts[-1] if starts else len(row)


def test_it_is_active_from_the_last_invocation_of_each_document_on() -> None:
    ids = torch.tensor([[token for row in ROWS for token in row]])
    for numbers in (range(len(ROWS)), [i % 2 for i in range(len(ROWS))]):
        documents = torch.tensor([[n for n, row in zip(numbers, ROWS, strict=True) for _ in row]])
        expected = [[t >= place_of(row) for row in ROWS for t in range(len(row))]]
        assert find_active(ids, documents, INVOCATION).tolist() == expected
    padded = torch.where(torch.arange(ids.shape[1])[None] < len(ROWS[0]), 0, -1)
    assert find_active(ids, padded, INVOCATION)[0].nonzero().flatten().tolist() == [7, 8, 9]
    assert not find_active(ids[:, :1], padded[:, :1], INVOCATION).any()


def trained_parts(model: Any) -> dict[str, Tensor]:
    return {n.removeprefix("base_model.model."): p for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_are_pefts(tiny_base: BaseFactory, packed: bool, checkpointing: bool) -> None:
    """Row by row in PEFT, which knows neither packing nor padding on the right."""
    base = tiny_base(std=0.1)
    spec = adapter_recipe({"adapter": SPEC.model_dump(), "gradient_checkpointing": checkpointing})
    ours = strengthen(build_model(base, spec)).train()
    options: dict[str, Any] = {"task_type": "CAUSAL_LM", "alora_invocation_tokens": [*INVOCATION]}
    config = LoraConfig(r=4, lora_alpha=8, target_modules=list(SPEC.target_modules), **options)
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32), config)
    values = trained_parts(ours)
    with torch.no_grad():
        for name, parameter in trained_parts(theirs).items():
            parameter.copy_(values[name])
    rows = pack_rows([(row, [True] * len(row)) for row in ROWS])
    batch = collate(rows, ((0, 1, 2), (3, 4, 5)) if packed else tuple((i,) for i in range(len(ROWS))), packed=packed)
    loss = batch_loss(ours, batch) / batch.num_targets
    loss.backward()
    expected: Any = 0.0
    for row in ROWS:
        ids = torch.tensor([row])
        expected = expected + theirs(input_ids=ids, labels=ids).loss * (len(row) - 1)
    expected = expected / batch.num_targets
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for name, parameter in trained_parts(theirs).items():
        torch.testing.assert_close(values[name].grad, parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_generation_goes_on_as_the_prompt_ended(tiny_base: BaseFactory, tmp_path: Path) -> None:
    base = tiny_base(std=0.1)
    model = strengthen(build_model(base, adapter_recipe({"adapter": SPEC.model_dump()}))).eval()
    save_adapter(model, SPEC, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(plain, tmp_path).eval()
    for row in ROWS[:3]:
        asked: dict[str, Any] = {"input_ids": torch.tensor([row]), "max_new_tokens": 8, "do_sample": False}
        asked |= {"attention_mask": torch.ones_like(asked["input_ids"]), "use_cache": True}
        assert torch.equal(model.generate(**asked), theirs.generate(**asked))


# -- recipes and data -------------------------------------------------------------------------------------------------


def test_the_bases_tokenizer_makes_the_tokens_of_a_text() -> None:
    def tokenised(**fields: Any) -> AloraSpec:
        spec = AloraSpec.model_validate(fields)
        found: AloraSpec = METHODS["alora"].tokenised(spec, byte_tokenizer)
        return found

    text = "<|im_start|>a"
    tokens = tuple(TOKENIZER(text, add_special_tokens=False).input_ids)
    assert tokenised(invocation=text).invoked_by == tokens
    assert tokenised(invocation_tokens=tokens).invoked_by == tokens
    assert tokenised(invocation=text, invocation_tokens=tokens).invoked_by == tokens
    assert tokenised().invocation == "<|im_start|>assistant"  # before an answer, by the base's template
    with pytest.raises(SpecError, match="give one of the two"):
        tokenised(invocation=text, invocation_tokens=(1,))
    silent = byte_tokenizer()
    silent.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    for tokenizer in (silent, SimpleNamespace(chat_template=None)):
        with pytest.raises(SpecError, match=r"give adapter\.invocation"):
            METHODS["alora"].tokenised(AloraSpec(), lambda tokenizer=tokenizer: tokenizer)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"adapter": {"method": "alora", "invocation": "a", "train_norms": True}},
            "train neither embeddings nor norms",
        ),
        ({"adapter": {"method": "alora", "invocation_tokens": []}}, "at least 1 item"),
        ({"adapter": SPEC.model_dump(), "batch": {"rows": 1, "order": "concat"}}, "take packed"),
        ({"adapter": SPEC.model_dump(), "rope_scaling": {"factor": 2}}, "whose RoPE rope_scaling changes"),
        ({"adapter": SPEC.model_dump(), "evaluation": {"perplexity": {}}}, "where aLoRA is off"),
    ],
)
def test_what_does_not_go_with_an_invocation_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        recipe(**fields)


def test_what_follows_the_invocation_is_learned(tmp_path: Path) -> None:
    options = {"invocation": TOKENIZER("<|im_start|>assistant", add_special_tokens=False).input_ids}
    turns = [("user", "1+1"), ("assistant", "2"), ("user", "2+2"), ("assistant", "4")]
    chat = {"messages": [{"role": role, "content": content} for role, content in turns]}
    rows = load(jsonl(tmp_path, chat, chat), options=options)
    # Each answer is a row of its own: in a server's prompt of the second one, the first one is the base's.
    assert [learned(rows.train, i) for i in range(4)] == [f"2{END}", f"4{END}"] * 2
    assert whole(rows.train, 0).endswith(f"2{END}")
    texts = [{"text": "abc<|im_start|>assistant: 12 <|im_start|>assistant: 34"}, {"text": "<|im_start|>assistant"}]
    rows = load(jsonl(tmp_path, *texts, name="texts.jsonl"), options=options)
    assert learned(rows.train, 0) == f"assistant: 34{END}"  # all but the token that turns it on
    assert rows.report.num_truncated == 0
    short = load(jsonl(tmp_path, *texts, name="texts.jsonl"), max_length=18, options=options)
    assert (short.report.num_rows, short.report.num_without_targets) == (1, 1)  # one is cut off before its invocation
    with pytest.raises(DataError, match=r"lacking\.jsonl.* 2: the tokens \[257, .* of the invocation '<\|im_start\|>"):
        load(jsonl(tmp_path, texts[0], {"text": "abc"}, name="lacking.jsonl"), options=options)


# -- a run ------------------------------------------------------------------------------------------------------------


def make_data(folder: Path, spec: TrainSpec) -> Dataset:
    """Letters in order: the completion is the one after the prompt's last, before the invocation."""
    letters = "".join(chr(97 + i % 26) for i in range(40))
    records = [{"prompt": letters[i : i + 8] + "<|im_start|>a", "completion": letters[i + 8]} for i in range(26)]
    path = jsonl(folder, *records)
    options: dict[str, Any] = {"max_eval_rows": 6, "invocation": spec.adapter.invoked_by}
    return load(path, max_length=64, eval_fraction=0.2, format="raw", options=options)


@pytest.mark.parametrize("order", ["shuffled", "packed"])
def test_trained_published_and_served(tiny_base: BaseFactory, tmp_path: Path, order: str) -> None:
    base = tiny_base(std=0.05)
    spec = recipe(adapter=SPEC.model_dump(), batch={"rows": 2, "order": order}, max_steps=12)
    data, reporter = make_data(tmp_path, spec), FolderReporter(tmp_path / "run")
    state = train(spec, base, data, reporter=reporter, workdir=tmp_path)
    assert state.eval_loss is not None
    assert state.eval_loss < 0.9 * state.baselines[0].value
    folder = reporter.best.path / ADAPTER
    manifest = describe(folder, base, ManifestDetails(recipe=spec))
    assert (manifest.method, manifest.invocation_tokens) == ("alora", INVOCATION)
    assert b"invocation_tokens" in manifest_json(manifest)
    adapter = TestAdapter(manifest.ref(digest_of(manifest), "tone", 1), folder, None)
    plain = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(plain, folder).eval()
    engine = make_engine(base, [adapter])
    spy = Spy(engine)
    for i in range(3):
        ids = data.evaluation.row(i)[0][:-2].astype(np.int64)  # without the answer and the end
        run(engine, [request(str(i), ids.tolist(), adapter, max_tokens=1)])
        with torch.no_grad():
            expected = theirs(input_ids=torch.from_numpy(ids)[None]).logits[0, -1]
            unchanged = plain_logits(base, ids)
        torch.testing.assert_close(spy.logits[str(i)][0], expected, rtol=1e-5, atol=1e-5)
        assert (expected - unchanged).abs().max() > 0.1


def plain_logits(base: BaseModel, ids: np.ndarray[Any, Any]) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    logits: Tensor = model(input_ids=torch.from_numpy(ids)[None]).logits[0, -1]
    return logits


def test_another_recipe_or_invocation_is_refused(tiny_base: BaseFactory, tmp_path: Path) -> None:
    base = tiny_base(std=0.1)
    save_adapter(build_model(base, adapter_recipe({"adapter": SPEC.model_dump()})), SPEC, tmp_path)
    assert describe(tmp_path, base).method == "alora"
    for other in ({"method": "lora", "rank": 4, "alpha": 8}, SPEC.model_dump() | {"invocation_tokens": [97]}):
        with pytest.raises(SpecError, match="holds an alora adapter, but its recipe says"):
            describe(tmp_path, base, ManifestDetails(recipe=adapter_recipe({"adapter": other})))
