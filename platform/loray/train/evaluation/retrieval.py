"""Retrieval of a key from a long text, by depth and length: exact match, and the key's log-likelihood.

One pass over prompt and key gives both: greedy decoding generates the key if each of its tokens is the most likely one
after those before it. Log-likelihood also distinguishes models that never generate a key.

Shapes: A tokens of the key, T tokens in all, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from loray.spec import RetrievalSpec
from loray.train.evaluation.kept import Figures, Pass, Take, compute_all, digest
from loray.train.evaluation.perplexity import finite
from loray.train.evaluation.prompts import Prompt, make_prompt
from loray.train.model import evaluating


class Answer(NamedTuple):
    """`log_likelihood` is log p(key | prompt) in nats, over all tokens of the key."""

    exact: bool
    log_likelihood: float


class Cell(NamedTuple):
    """Means over the prompts of one length and depth."""

    context_length: int
    depth: float
    exact_match: float
    log_likelihood: float


def retrieve(
    model: Callable[[], Any], tokenizer: Any, spec: RetrievalSpec, context_length: int, take: Take = compute_all
) -> tuple[Cell, ...]:
    """Cells of one length with every depth, in order.

    `model` gives a transformers causal language model, which does not change. It is called for prompts alone whose
    scores `take` does not have.
    """
    prompts = [
        make_prompt(spec.task, tokenizer, context_length, depth, seed=spec.seed, sample=sample)
        for depth in spec.depths
        for sample in range(spec.samples)
    ]
    passes = [Pass(digest("retrieval", prompt.answer, prompt.ids, prompt.answer_ids), 1) for prompt in prompts]

    def compute(i: int) -> Figures:
        return score(model(), tokenizer, prompts[i])._asdict()

    scores = take(passes, compute)
    cells = []
    for i, depth in enumerate(spec.depths):
        mine = scores[i * spec.samples : (i + 1) * spec.samples]
        exact, likelihood = (_mean([figures[name] for figures in mine]) for name in Answer._fields)
        cells.append(Cell(context_length, depth, exact, likelihood))
    return tuple(cells)


@torch.no_grad()
def score(model: Any, tokenizer: Any, prompt: Prompt) -> Answer:
    """Exact match and log-likelihood of the answer. A number matches only if greedy decoding adds no further digit.

    Raises EvaluationError where a logit is not finite.
    """
    device = next(model.parameters()).device
    ids_1T = torch.tensor([[*prompt.ids, *prompt.answer_ids]], device=device)
    answer_A = ids_1T[0, len(prompt.ids) :]
    with evaluating(model):
        hidden_TD = model.base_model(input_ids=ids_1T, use_cache=False).last_hidden_state[0]
    head_VD = model.get_output_embeddings().weight
    log_probs_V = (
        (hidden_TD[len(prompt.ids) - 1 :] @ head_VD.T).float().log_softmax(-1)
    )  # of the key and the next token
    likely = log_probs_V.argmax(-1)
    goes_on = prompt.answer[-1].isdigit() and tokenizer.decode([int(likely[-1])])[:1].isdigit()
    log_likelihood = float(log_probs_V[:-1].gather(1, answer_A[:, None]).double().sum())
    return Answer(
        exact=bool((likely[:-1] == answer_A).all()) and not goes_on,
        log_likelihood=finite(log_likelihood, f"the log-likelihood of a key in {ids_1T.shape[1]:,} tokens"),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
