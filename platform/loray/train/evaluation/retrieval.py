"""Retrieval of a key from a long text, by depth and length: exact match, and the key's log-likelihood.

One pass over prompt and key gives both: greedy decoding generates the key if each of its tokens is the most likely one
after those before it. Log-likelihood also distinguishes models that never generate a key.

Shapes: T tokens in all, N of the key and the one after it, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loray.spec import RetrievalSpec
from loray.train.data.batches import IGNORED
from loray.train.evaluation.kept import Figures, Pass, Take, digest, take_all
from loray.train.evaluation.measured import Measured
from loray.train.evaluation.prompts import Prompt, make_prompt

_AFTER = -1  # the label of the key's last token, whose next one is looked at too


class Answer(NamedTuple):
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
    """Cells of one length with every depth, in order.

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

    answers = [Answer(**figures) for figures in take(passes, compute)]
    cells = []
    for i, depth in enumerate(spec.depths):
        mine = answers[i * spec.samples : (i + 1) * spec.samples]
        exact, likelihood = _mean([a.is_exact for a in mine]), _mean([a.log_likelihood for a in mine])
        cells.append(Cell(context_length, depth, exact, likelihood))
    return tuple(cells)


def score(model: Measured, tokenizer: Any, prompt: Prompt) -> Answer:
    """The answer of one prompt; of a sequence group's rank the part that it holds."""
    ids_1T = torch.tensor([[*prompt.ids, *prompt.answer_ids]])
    labels_1T = torch.full_like(ids_1T, IGNORED)
    labels_1T[0, len(prompt.ids) - 1 : -1] = ids_1T[0, len(prompt.ids) :]
    labels_1T[0, -1] = _AFTER

    def answer(hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor) -> Figures:
        log_probs_NV = (hidden_ND @ head_VD.T).float().log_softmax(-1)
        likely_N, is_key_N = log_probs_NV.argmax(-1), labels_N != _AFTER
        of_key_N = log_probs_NV[is_key_N].gather(1, labels_N[is_key_N][:, None])
        num_wrong = int((likely_N != labels_N)[is_key_N].sum())
        if prompt.answer[-1].isdigit():
            num_wrong += sum(tokenizer.decode([int(i)])[:1].isdigit() for i in likely_N[~is_key_N])
        return Answer(float(of_key_N.double().sum()), num_wrong)._asdict()

    return Answer(**model.figures(ids_1T, labels_1T, answer))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
