"""The same evaluations of the base, the base under the adapter's RoPE, and the adapter."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from math import exp, inf

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer

from loray.bases.registry import BaseModel
from loray.spec import (
    EXACT_MATCH,
    LOG_LIKELIHOOD,
    PERPLEXITY,
    DType,
    Evaluation,
    PerplexitySpec,
    RetrievalSpec,
    Subject,
    TrainSpec,
    retrieval_metric,
)
from loray.telemetry import Progress
from loray.train.evaluation.documents import Documents, cut_windows
from loray.train.evaluation.kept import KeptFigures, finite
from loray.train.evaluation.perplexity import mean_loss
from loray.train.evaluation.retrieval import Cell, retrieve
from loray.train.evaluation.subjects import MeasuredModel, identity, load
from loray.train.mesh import ALONE, Mesh

_MAX_LOSS = 700.0  # exp of it is still finite; the loss of a uniform guess is the logarithm of the vocabulary's size


def measure(
    base: BaseModel,
    models: Sequence[MeasuredModel],
    *,
    dtype: DType,
    documents: Documents | None = None,
    perplexity: PerplexitySpec | None = None,
    retrieval: Sequence[RetrievalSpec] = (),
    device: torch.device | None = None,
    progress: Progress = lambda stage, share: None,
    kept: KeptFigures | None = None,
    mesh: Mesh = ALONE,
    trained_by: TrainSpec | None = None,
) -> tuple[Evaluation, ...]:
    """Perplexity on `documents` and retrieval of every model. One model is in memory at a time, and none whose figures
    are all in `kept` (None: nothing is kept). The ranks of `mesh` measure together, as `load` shares a model among the
    workers of the recipe `trained_by`; all make the same call and get the same figures.

    Raises DataError where no document is as long as a context, SpecError where a retrieval prompt does not fit into
    one, and EvaluationError where a value is not finite.
    """
    device = device or torch.device("cpu")
    kept = kept or KeptFigures(mesh=mesh, device=device)
    windows = {} if perplexity is None or documents is None else _windows(documents, perplexity)
    tokenizer = AutoTokenizer.from_pretrained(base.path)
    measured: list[Evaluation] = []
    for measured_model in models:
        model = cache(partial(load, base, measured_model, dtype=dtype, device=device, mesh=mesh, trained_by=trained_by))
        take = partial(kept.figures, identity(base, measured_model, dtype=dtype, device=device))
        subject = measured_model.subject
        name = subject.replace("_", " ")
        if perplexity is not None and documents is not None:
            for context_length, windows_T in windows.items():
                stage = f"{name}, perplexity at {context_length:,} tokens"
                loss = mean_loss(model, windows_T, partial(take, progress=partial(progress, stage)))
                measured.append(
                    Evaluation(
                        metric=PERPLEXITY,
                        value=_perplexity(loss, stage),
                        dataset=documents.name,
                        subject=subject,
                        context_length=context_length,
                        stride=perplexity.stride,
                        count=len(windows_T),
                        data_sha256=documents.sha256,
                    )
                )
        for spec in retrieval:
            for context_length in spec.context_lengths:
                stage = f"{name}, {spec.task} at {context_length:,} tokens"
                cells = retrieve(
                    model, tokenizer, spec, context_length, partial(take, progress=partial(progress, stage))
                )
                measured += [e for cell in cells for e in _evaluations(cell, spec, subject)]
        del model
    return tuple(measured)


def _perplexity(loss: float, what: str) -> float:
    return finite(exp(loss) if loss < _MAX_LOSS else inf, what)


def _windows(documents: Documents, spec: PerplexitySpec) -> dict[int, tuple[NDArray[np.int32], ...]]:
    """Windows by context length."""
    return {
        length: cut_windows(documents, length, stride=spec.stride, max_windows=spec.max_windows)
        for length in spec.context_lengths
    }


def _evaluations(cell: Cell, spec: RetrievalSpec, subject: Subject) -> list[Evaluation]:
    values = {EXACT_MATCH: cell.exact_match, LOG_LIKELIHOOD: cell.log_likelihood}
    return [
        Evaluation(
            metric=retrieval_metric(spec.task, metric),
            value=value,
            dataset=f"{spec.task}, seed {spec.seed}",
            subject=subject,
            context_length=cell.context_length,
            depth=cell.depth,
            count=spec.samples,
        )
        for metric, value in values.items()
    ]
