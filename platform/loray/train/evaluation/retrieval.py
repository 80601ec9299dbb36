"""Retrieval of a key from a long prompt, by two tasks.

passkey  Mohtashami & Jaggi, *Landmark Attention* (2023), appendix: a number between two stretches of filler. LongLoRA
         is evaluated on it by length and depth.
topics   LongChat's LongEval (Li et al., 2023): a record of conversations, and the question for the topic of the n-th.
         The sentences of the conversations are loray's. The prompt begins the answer, so that base models that do not
         chat can complete it.

One pass over prompt and key gives both: greedy decoding generates the key if each of its tokens is the most likely one
after those before it. Log-likelihood also distinguishes models that never generate a key.

Shapes: T tokens in all, N of the key and the one after it, D hidden size, V vocabulary.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from loray.errors import SpecError
from loray.spec import RetrievalSpec, RetrievalTask
from loray.train.data.batches import IGNORED
from loray.train.divergence import head_logits
from loray.train.evaluation.documents import token_ids
from loray.train.evaluation.perplexity import Figures, Measured, Pass, Take, digest, take_all
from loray.train.objectives import LabelledStates

_TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
_FILLER = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
_QUESTION = "What is the pass key? The pass key is"

# A topic is an aspect of a subject; exchanges are questions with answers, which fit any topic.
_TOPICS = json.loads(Path(__file__).with_name("topics.json").read_text(encoding="utf-8"))

_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")


class Prompt(NamedTuple):
    """The correct continuation of `text` is a space and `answer`; `ids` and `answer_ids` are their tokens.

    `depth` is the position of the key in the filler, as near to the requested depth as the pieces of filler allow.
    """

    text: str
    answer: str
    ids: list[int]
    answer_ids: list[int]
    depth: float


def make_prompt(
    task: RetrievalTask, tokenizer: Any, context_length: int, depth: float, *, seed: int = 0, sample: int = 0
) -> Prompt:
    """Make the longest prompt of at most `context_length` tokens, answer included, with its key at `depth` (0 to 1).

    The key is drawn from all arguments but the tokenizer. Raises SpecError where the question does not fit, or the
    topics do not fill the context.
    """
    draw = random.Random(f"{task} {context_length} {depth} {seed} {sample}")
    writer = _passkey(draw) if task == "passkey" else _topics(draw)

    def made(num_pieces: int) -> Prompt:
        text, answer, actual = writer.write(num_pieces, depth)
        return Prompt(text, answer, *_token_ids(tokenizer, text, answer), actual)

    def num_tokens(num_pieces: int) -> int:
        prompt = made(num_pieces)
        return len(prompt.ids) + len(prompt.answer_ids)

    count = _largest(lambda n: num_tokens(n) <= context_length, writer.max_pieces)
    if count == writer.max_pieces:
        raise SpecError(f"{context_length:,} tokens are more than {count} topics fill; ask for a shorter context")
    if not count:
        raise SpecError(
            f"a {task} prompt needs {num_tokens(1)} tokens at least; context length {context_length} is too short"
        )
    return made(count)


class _Writer(NamedTuple):
    """`write(pieces of filler, depth)` → (text, answer, actual depth)."""

    write: Callable[[int, float], tuple[str, str, float]]
    max_pieces: int = 1 << 40


def _passkey(draw: random.Random) -> _Writer:
    key = str(draw.randint(10_000, 99_999))

    def write(num_sentences: int, depth: float) -> tuple[str, str, float]:
        before = round(depth * num_sentences)
        parts = [
            _TASK,
            _filler(before),
            f"The pass key is {key}. Remember it. {key} is the pass key.",
            _filler(num_sentences - before),
            _QUESTION,
        ]
        return "\n".join(filter(None, parts)), key, before / num_sentences

    return _Writer(write)


def _filler(num_sentences: int) -> str:
    return " ".join(_FILLER[i % len(_FILLER)] for i in range(num_sentences))


def _topics(draw: random.Random) -> _Writer:
    topics = [f"{aspect} {subject}" for aspect in _TOPICS["aspects"] for subject in _TOPICS["subjects"]]
    draw.shuffle(topics)

    def write(num_topics: int, depth: float) -> tuple[str, str, float]:
        asked = round(depth * (num_topics - 1))
        which = _ordinal(asked + 1)
        parts = [
            f"Below is a record of our previous conversation on {num_topics} different topics. You are the ASSISTANT, "
            "and I am the USER. At the beginning of each topic, the USER will say 'I would like to discuss the topic "
            f"of <TOPIC>'. Memorize each <TOPIC>. At the end of the record, I will ask you to retrieve the {which} "
            "topic. Now the record start.",
            *(_conversation(topic) for topic in topics[:num_topics]),
            f"USER: Now the record ends. What is the {which} topic we discussed? Only give me the topic name. "
            "Do not summarize yourself.",
            f"ASSISTANT: The {which} topic we discussed is",
        ]
        return "\n".join(parts), topics[asked], asked / max(1, num_topics - 1)

    return _Writer(write, max_pieces=len(topics))


def _conversation(topic: str) -> str:
    lines = [
        f"USER: I would like to discuss the topic of {topic}.",
        "ASSISTANT: Sure, I would be happy to discuss that with you. What would you like to know about it?",
    ]
    for asked, answered in _TOPICS["exchanges"]:
        lines += [f"USER: {asked}", f"ASSISTANT: {answered}"]
    return "\n".join(lines)


def _ordinal(number: int) -> str:
    if number <= len(_ORDINALS):
        return _ORDINALS[number - 1]
    suffix = "th" if 10 < number % 100 < 14 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{suffix}"


def _token_ids(tokenizer: Any, text: str, answer: str) -> tuple[list[int], list[int]]:
    """Tokens of the prompt and of its answer: both are tokenised as one text, and cut at the end of the prompt."""
    alone, whole = token_ids(tokenizer, [text, f"{text} {answer}"])
    differing = (i for i, (x, y) in enumerate(zip(alone, whole, strict=False)) if x != y)
    cut = next(differing, min(len(alone), len(whole)))
    return whole[:cut], whole[cut:]


def _largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest n up to `limit` with `fits(n)`, which is monotone; 0 where 1 does not fit."""
    if not fits(1):
        return 0
    low, high = 1, 2
    while high <= limit and fits(high):
        low, high = high, 2 * high
    high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


_AFTER = -1  # the label of the key's last token, whose next one is looked at too


class RetrievalScore(NamedTuple):
    """`log_likelihood` is log p(key | prompt) in nats, over all tokens of the key. `num_wrong` counts its tokens that
    greedy decoding would not write, and a digit that it would add.
    """

    log_likelihood: float
    num_wrong: float

    @property
    def is_exact(self) -> bool:
        return self.num_wrong == 0


class Cell(NamedTuple):
    """Means over the prompts of one length and depth."""

    context_length: int
    depth: float
    exact_match: float
    log_likelihood: float


def retrieve(
    model: Callable[[], Measured], tokenizer: Any, spec: RetrievalSpec, context_length: int, take: Take = take_all
) -> tuple[Cell, ...]:
    """Measure the cells of one length with every depth, in order.

    `model` is called for prompts alone whose scores `take` does not have. Raises EvaluationError where a log-likelihood
    is not finite.
    """
    prompts = [
        make_prompt(spec.task, tokenizer, context_length, depth, seed=spec.seed, sample=sample)
        for depth in spec.depths
        for sample in range(spec.samples)
    ]
    name = f"the log-likelihood of a key in {context_length:,} tokens"
    passes = [Pass(digest("retrieval", prompt.answer, prompt.ids, prompt.answer_ids), 1, name) for prompt in prompts]

    def compute(i: int) -> Figures:
        return score(model(), tokenizer, prompts[i])._asdict()

    answers = [RetrievalScore(**figures) for figures in take(passes, compute)]
    cells = []
    for i, depth in enumerate(spec.depths):
        mine = answers[i * spec.samples : (i + 1) * spec.samples]
        exact, likelihood = _mean([a.is_exact for a in mine]), _mean([a.log_likelihood for a in mine])
        cells.append(Cell(context_length, depth, exact, likelihood))
    return tuple(cells)


def score(model: Measured, tokenizer: Any, prompt: Prompt) -> RetrievalScore:
    """Score the answer of one prompt; a rank of a sequence group scores the part that it holds."""
    ids_1T = torch.tensor([[*prompt.ids, *prompt.answer_ids]])
    labels_1T = torch.full_like(ids_1T, IGNORED)
    labels_1T[0, len(prompt.ids) - 1 : -1] = ids_1T[0, len(prompt.ids) :]
    labels_1T[0, -1] = _AFTER

    def answer(states: LabelledStates) -> Figures:
        labels_N = states.labels_N
        logits_NV = head_logits(states.hidden_ND, states.head_VD, states.soft_cap, torch.float32)
        log_probs_NV = logits_NV.log_softmax(-1)
        likely_N, is_key_N = log_probs_NV.argmax(-1), labels_N != _AFTER
        of_key_N = log_probs_NV[is_key_N].gather(1, labels_N[is_key_N][:, None])
        num_wrong = int((likely_N != labels_N)[is_key_N].sum())
        if prompt.answer[-1].isdigit():
            num_wrong += sum(tokenizer.decode([int(i)])[:1].isdigit() for i in likely_N[~is_key_N])
        return RetrievalScore(float(of_key_N.double().sum()), num_wrong)._asdict()

    return RetrievalScore(**model.figures(ids_1T, labels_1T, answer))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
