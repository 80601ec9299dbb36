"""Measuring of a checkpoint beside its base before it is published, on the run's workers: a base that they share to
train they share here too. Without a cluster the driver's process measures alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import ray.train
import torch
from ray.train import Checkpoint

from jobs.workers.worker import num_threads
from loray.bases.registry import ensure_base
from loray.priority import compute_in_background
from loray.spec import Evaluation, EvaluationSpec, RopeParameters, TrainSpec
from loray.telemetry import configure_logging
from loray.train.checkpoint import ADAPTER
from loray.train.evaluation.documents import Documents


class Measurement(NamedTuple):
    """A checkpoint and what is measured of it. `spec`: the recipe that trained it, on the workers at hand."""

    spec: TrainSpec
    evaluation: EvaluationSpec
    checkpoint: Checkpoint
    documents: Documents | None
    rope: RopeParameters | None
    base_fingerprint: str
    home: Path
    log_level: str


def run(config: dict[str, Measurement]) -> tuple[Evaluation, ...]:
    """Measures on each of Ray Train's workers; `config` has the measurement as its only value."""
    (measurement,) = config.values()
    configure_logging(measurement.log_level)
    if not measurement.spec.use_gpu:
        compute_in_background()
    torch.set_num_threads(num_threads())
    return measure_here(measurement)


def measure_here(measurement: Measurement) -> tuple[Evaluation, ...]:
    """Measures in a collective call of the process group, if there is one. Raises LorayError, and what torch raises
    where a device has too little memory.
    """
    # Late: PEFT and models take two seconds to import, which the driver spares itself.
    from loray.train.evaluation.measure import measure, subjects
    from loray.train.evaluation.perplexity import KeptFigures
    from loray.train.mesh import ALONE, Mesh

    spec, home = measurement.spec, measurement.home
    has_group = torch.distributed.is_initialized()
    device = torch.device("cpu")
    if spec.use_gpu:
        device = ray.train.torch.get_device() if has_group else torch.device("cuda")
    mesh = Mesh.build(spec.parallel.sequence, device) if has_group else ALONE
    base = ensure_base(home, spec.base, fingerprint=measurement.base_fingerprint)
    with measurement.checkpoint.as_directory() as folder:
        return measure(
            base,
            subjects(measurement.rope, Path(folder) / ADAPTER, compare=True),
            documents=measurement.documents,
            perplexity=measurement.evaluation.perplexity,
            retrieval=measurement.evaluation.retrieval,
            dtype=spec.chosen_dtype,
            device=device,
            kept=KeptFigures(home, mesh=mesh, device=device),
            mesh=mesh,
            trained_by=spec,
        )
