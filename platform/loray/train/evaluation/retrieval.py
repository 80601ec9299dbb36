"""Retrieval of a key from a long text, by depth and length: exact match, and the key's log-likelihood.

One pass over prompt and key gives both: greedy decoding generates the key if each of its tokens is the most likely one
after those before it. Log-likelihood also distinguishes models that never generate a key.

Shapes: A tokens of the key, T tokens in all, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from loray.spec import RetrievalSpec
from loray.telemetry import StageProgress
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
    model: Any, tokenizer: Any, spec: RetrievalSpec, progress: StageProgress = lambda share: None
) -> tuple[Cell, ...]:
    """Cells of every length with every depth, in order. `model` is a transformers causal language model, which does not
    change.
    """
    cells = []
    grid = [(length, depth) for length in spec.context_lengths for depth in spec.depths]
    for i, (length, depth) in enumerate(grid):
        answers = []
        for sample in range(spec.samples):
            prompt = make_prompt(spec.task, tokenizer, length, depth, seed=spec.seed, sample=sample)
            answers.append(score(model, tokenizer, prompt))
            progress((i + (sample + 1) / spec.samples) / len(grid))
        exact, likelihood = _mean([a.exact for a in answers]), _mean([a.log_likelihood for a in answers])
        cells.append(Cell(length, depth, exact, likelihood))
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
