"""Before and after: the same figures of the base, the base under the adapter's RoPE, and the adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import exp, inf

import torch
from transformers import AutoTokenizer

from loray.bases.registry import BaseModel
from loray.spec import PERPLEXITY, DType, Evaluation, PerplexitySpec, RetrievalSpec
from loray.train.evaluation.documents import Documents, Windows, cut_windows
from loray.train.evaluation.perplexity import finite, mean_loss
from loray.train.evaluation.retrieval import Cell, retrieve
from loray.train.evaluation.subjects import Subject, load

_MAX_LOSS = 700.0  # where exp still is a number; a model that knows nothing is at the logarithm of its vocabulary

Tell = Callable[[str, float], None]  # (what is being measured, share done of it)

EXACT_MATCH, LOG_LIKELIHOOD = "exact_match", "log_likelihood"  # behind the task: passkey_exact_match


def measure(
    base: BaseModel,
    subjects: Sequence[Subject],
    *,
    documents: Documents | None = None,
    perplexity: PerplexitySpec | None = None,
    retrieval: Sequence[RetrievalSpec] = (),
    dtype: DType = "bfloat16",
    device: torch.device | None = None,
    tell: Tell = lambda what, share: None,
) -> tuple[Evaluation, ...]:
    """Perplexity on `documents` and retrieval of every subject, one model in memory after the other.

    DataError where no document is as long as a context, SpecError where a retrieval prompt does not fit into one,
    EvaluationError where a figure is not finite.
    """
    windows = {} if perplexity is None or documents is None else _windows(documents, perplexity)
    tokenizer = AutoTokenizer.from_pretrained(base.path)
    measured: list[Evaluation] = []
    for subject in subjects:
        model = load(base, subject, dtype=dtype, device=device or torch.device("cpu"))
        if perplexity is not None and documents is not None:
            for context_length, cut in windows.items():
                what = f"{_name(subject)}, perplexity at {context_length:,} tokens"
                value = _perplexity(mean_loss(model, cut.ids_T, partial(tell, what)), what)
                measured.append(
                    Evaluation(
                        metric=PERPLEXITY,
                        value=value,
                        dataset=documents.name,
                        subject=subject.kind,
                        context_length=context_length,
                        stride=perplexity.stride,
                        count=len(cut.ids_T),
                        data_sha256=documents.sha256,
                    )
                )
        for spec in retrieval:
            cells = retrieve(model, tokenizer, spec, partial(tell, f"{_name(subject)}, {spec.task}"))
            measured += [e for cell in cells for e in _figures(cell, spec, subject)]
        del model
    return tuple(measured)


def _perplexity(loss: float, what: str) -> float:
    return finite(exp(loss) if loss < _MAX_LOSS else inf, what)


def _windows(documents: Documents, spec: PerplexitySpec) -> dict[int, Windows]:
    """By context length."""
    return {
        length: cut_windows(documents, length, stride=spec.stride, max_windows=spec.max_windows)
        for length in spec.context_lengths
    }


def _figures(cell: Cell, spec: RetrievalSpec, subject: Subject) -> list[Evaluation]:
    values = {EXACT_MATCH: cell.exact_match, LOG_LIKELIHOOD: cell.log_likelihood}
    return [
        Evaluation(
            metric=f"{spec.task}_{metric}",
            value=value,
            dataset=f"{spec.task}, seed {spec.seed}",
            subject=subject.kind,
            context_length=cell.context_length,
            depth=cell.depth,
            count=spec.samples,
        )
        for metric, value in values.items()
    ]


def _name(subject: Subject) -> str:
    return subject.kind.replace("_", " ")
