"""Retrieval: what prompts look like, and their scores against a direct computation."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from loray.bases.registry import BaseModel
from loray.errors import SpecError
from loray.spec import RetrievalSpec, RetrievalTask
from loray.train.evaluation import retrieval
from loray.train.evaluation.measure import MeasuredModel, load, measure
from loray.train.evaluation.perplexity import Measured
from loray.train.evaluation.retrieval import Prompt, make_prompt, retrieve, score
from tests.fixtures.tiny import byte_tokenizer

TOKENIZER = byte_tokenizer()
CPU = torch.device("cpu")
FILLER_BYTES = len(" There and back again.")  # the longest sentence of filler
CONVERSATION_BYTES = 1300


def prompt(task: RetrievalTask, length: int, depth: float, **options: Any) -> Prompt:
    return make_prompt(task, TOKENIZER, length, depth, **options)


# -- prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [400, 1000, 4096])
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_a_passkey_lies_at_its_depth_in_a_full_context(length: int, depth: float) -> None:
    made = prompt("passkey", length, depth)
    assert length - FILLER_BYTES <= len(made.ids) + len(made.answer_ids) <= length
    task, *rest, question = made.text.split("\n")
    assert task.startswith(
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them"
    )
    assert question == "What is the pass key? The pass key is"
    assert re.fullmatch(r"\d{5}", made.answer)
    line = f"The pass key is {made.answer}. Remember it. {made.answer} is the pass key."
    before, after = rest[: rest.index(line)], rest[rest.index(line) + 1 :]
    filler = [sum(map(len, part)) for part in (before, after)]
    assert filler[0] / sum(filler) == pytest.approx(depth, abs=30 / sum(filler))
    assert made.depth == pytest.approx(depth, abs=20 / sum(filler))
    for part in before + after:
        assert part.startswith("The grass is green. The sky is blue.") or len(part) < 30
    assert TOKENIZER.decode(made.ids, skip_special_tokens=True) == made.text
    assert TOKENIZER.decode(made.answer_ids) == f" {made.answer}"


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_topic_is_asked_for_by_its_number(depth: float) -> None:
    made = prompt("topics", 8000, depth)
    assert 8000 - CONVERSATION_BYTES <= len(made.ids) + len(made.answer_ids) <= 8000
    topics = re.findall(r"USER: I would like to discuss the topic of (.*)\.\n", made.text)
    asked = topics.index(made.answer)
    assert asked / (len(topics) - 1) == pytest.approx(depth, abs=0.5 / (len(topics) - 1)) == made.depth
    assert len(set(topics)) == len(topics) > 4
    which = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh"][asked]
    assert made.text.startswith(f"Below is a record of our previous conversation on {len(topics)} different topics.")
    assert f"What is the {which} topic we discussed? Only give me the topic name." in made.text
    assert made.text.endswith(f"\nASSISTANT: The {which} topic we discussed is")


def test_prompts_are_a_function_of_the_seed() -> None:
    for task, length in (("passkey", 500), ("topics", 4000)):
        made = [prompt(task, length, 0.5, seed=seed, sample=sample) for seed in (0, 1) for sample in (0, 1)]
        assert made[0] == prompt(task, length, 0.5)
        assert len({p.answer for p in made}) == 4


def test_what_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SpecError, match=r"a passkey prompt needs \d+ tokens at least; context length 100 is too short"):
        prompt("passkey", 100, 0.5)
    assert prompt("topics", 30_000, 1.0).text.endswith("ASSISTANT: The 23rd topic we discussed is")
    monkeypatch.setitem(retrieval._TOPICS, "subjects", ["pottery", "volcanoes"])
    with pytest.raises(SpecError, match="more than 40 topics fill"):
        prompt("topics", 100_000, 0.5)


# -- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["passkey", "topics"])
def test_log_likelihood_is_that_of_the_key(tiny_base: Callable[..., BaseModel], task: RetrievalTask) -> None:
    base = tiny_base(max_position_embeddings=4096, std=0.1)
    made = prompt(task, 3000, 0.5)
    found = score(load(base, MeasuredModel("base"), dtype="float32", device=CPU), TOKENIZER, made)
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float64)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*made.ids, *made.answer_ids]])).logits[0]
    log_probs = logits.log_softmax(-1)
    expected = sum(float(log_probs[len(made.ids) + i - 1, token]) for i, token in enumerate(made.answer_ids))
    assert found.log_likelihood == pytest.approx(expected, rel=1e-5)
    assert not found.is_exact  # nobody has taught it to


class Parrot(nn.Module):
    """Says `words` from position `start` on, certain of each token, whatever it is asked."""

    config = SimpleNamespace(_attn_implementation="sdpa")

    def __init__(self, words: list[int], start: int) -> None:
        super().__init__()
        self.words, self.start = words, start
        self.weight = nn.Parameter(torch.eye(TOKENIZER.vocab_size + 3))

    def base_model(self, input_ids: Tensor, use_cache: bool) -> Any:
        said = torch.zeros(input_ids.shape[1], dtype=torch.long)
        said[self.start : self.start + len(self.words)] = torch.tensor(self.words)[: len(said) - self.start]
        return SimpleNamespace(last_hidden_state=50.0 * F.one_hot(said, self.weight.shape[0]).float()[None])

    def get_output_embeddings(self) -> Any:
        return self


@pytest.mark.parametrize(
    ("suffix", "edit", "exact"),
    [(".", None, True), ("7", None, False), (" 7", None, True), (".", -1, False), (".", 1, False)],
    ids=["the key", "it goes on", "another word", "last digit wrong", "first digit wrong"],
)
def test_exact_is_what_greedy_decoding_would_write(suffix: str, edit: int | None, exact: bool) -> None:
    made = prompt("passkey", 600, 0.5)
    words = list(made.answer_ids)
    if edit is not None:
        words[edit] = TOKENIZER("x", add_special_tokens=False)["input_ids"][0]
    words += TOKENIZER(suffix, add_special_tokens=False)["input_ids"]
    parrot = Parrot(words, len(made.ids) - 1)
    found = score(Measured(parrot), TOKENIZER, made)
    assert found.is_exact is exact
    assert found.log_likelihood == pytest.approx(0.0 if edit is None else -50.0, abs=1e-3)


def test_the_grid(tiny_base: Callable[..., BaseModel]) -> None:
    base = tiny_base(max_position_embeddings=4096, std=0.1)
    spec = RetrievalSpec(context_lengths=(400, 600), depths=(0.0, 1.0), samples=2, seed=3)
    model = load(base, MeasuredModel("base"), dtype="float32", device=CPU)
    cells = retrieve(lambda: model, TOKENIZER, spec, 600)
    assert [(c.context_length, c.depth) for c in cells] == [(600, 0), (600, 1)]
    alone = [score(model, TOKENIZER, prompt("passkey", 600, 1.0, seed=3, sample=i)) for i in range(2)]
    assert cells[-1].log_likelihood == pytest.approx(sum(a.log_likelihood for a in alone) / 2, rel=1e-6)

    told: list[tuple[str, float]] = []
    measured = measure(
        base,
        [MeasuredModel("base")],
        retrieval=[spec],
        dtype="float32",
        progress=lambda stage, share: told.append((stage, share)),
    )
    assert told == [(f"base, passkey at {n} tokens", i / 4) for n in (400, 600) for i in range(5)]
    assert [(e.context_length, e.depth) for e in measured[::2]] == [(400, 0), (400, 1), (600, 0), (600, 1)]
    assert [(e.metric, e.context_length, e.depth) for e in measured][-2:] == [
        ("passkey_exact_match", 600, 1.0),
        ("passkey_log_likelihood", 600, 1.0),
    ]
    assert measured[-1].value == pytest.approx(cells[-1].log_likelihood, rel=1e-6)
    assert {(e.dataset, e.count, e.subject) for e in measured} == {("passkey, seed 3", 2, "base")}
