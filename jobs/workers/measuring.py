"""Measuring of a checkpoint beside its base before it is published, on the run's workers: a base that they share to
train they share here too. Without a cluster the driver's process measures alone. The models that are measured answer a
few held-out prompts, too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import ray.train
import torch
from ray.actor import ActorHandle
from ray.train import Checkpoint

from jobs.events import SILENT, Emit, Stages
from jobs.workers.reporting import EventSender
from jobs.workers.worker import num_threads
from loray.bases.registry import ensure_base
from loray.bases.rounding import form_trained_on
from loray.priority import compute_in_background
from loray.spec import Evaluation, EvaluationSpec, RopeParameters, TrainSpec
from loray.telemetry import Progress, configure_logging
from loray.train.checkpoint import ADAPTER
from loray.train.evaluation.documents import Documents, HeldOutPrompt, stage_tokens


class Measurement(NamedTuple):
    """A checkpoint and what is measured of it. `spec`: the recipe that trained it, on the workers at hand. `prompts`
    are answered by the base and by the adapter. `events`: the event sink's actor.
    """

    spec: TrainSpec
    evaluation: EvaluationSpec
    checkpoint: Checkpoint
    documents: Documents | None
    rope: RopeParameters | None
    base_fingerprint: str
    home: Path
    log_level: str
    prompts: tuple[HeldOutPrompt, ...] = ()
    events: ActorHandle | None = None


class Findings(NamedTuple):
    """`samples` are empty where there are no prompts, or no worker has a whole model."""

    evaluations: tuple[Evaluation, ...]
    samples: list[dict[str, str]]


def run(config: dict[str, Measurement]) -> Findings:
    """Measures on each of Ray Train's workers; `config` has the measurement as its only value."""
    (measurement,) = config.values()
    configure_logging(measurement.log_level)
    if not measurement.spec.use_gpu:
        compute_in_background()
    torch.set_num_threads(num_threads())
    events = EventSender(measurement.events)
    found = measure_here(measurement, events.send)
    events.flush()
    return found


def measure_here(measurement: Measurement, emit: Emit = lambda event: None) -> Findings:
    """Measures in a collective call of the process group, if there is one. `emit` is told on the first rank how far it
    is. Raises LorayError, and what torch raises where a device has too little memory.
    """
    # Late: PEFT and models take two seconds to import, which the driver spares itself.
    from loray.train.evaluation.measure import measure, subjects
    from loray.train.evaluation.perplexity import KeptFigures
    from loray.train.evaluation.samples import Answers
    from loray.train.mesh import ALONE, Mesh

    spec, home = measurement.spec, measurement.home
    has_group = torch.distributed.is_initialized()
    device = torch.device("cpu")
    if spec.use_gpu:
        device = ray.train.torch.get_device() if has_group else torch.device("cuda")
    mesh = Mesh.build(spec.parallel.sequence, device) if has_group else ALONE
    base = form_trained_on(ensure_base(home, spec.base, fingerprint=measurement.base_fingerprint), spec, home)
    stages = Stages(emit) if mesh.world.rank == 0 else SILENT
    answers = Answers(base, measurement.prompts if mesh.world.rank == 0 else (), stages)
    with measurement.checkpoint.as_directory() as folder:
        models = subjects(measurement.rope, Path(folder) / ADAPTER, compare=True)
        wanted = measurement.evaluation
        tokens = stage_tokens([model.subject for model in models], wanted, measurement.documents)
        evaluations = measure(
            base,
            models,
            documents=measurement.documents,
            perplexity=wanted.perplexity,
            retrieval=wanted.retrieval,
            dtype=spec.chosen_dtype,
            device=device,
            kept=KeptFigures(home, mesh=mesh, device=device),
            mesh=mesh,
            trained_by=spec,
            progress=whole_progress(tokens, stages),
            look=answers.take,
        )
    return Findings(evaluations, answers.samples())


def whole_progress(tokens: Mapping[str, int], stages: Stages, clock: Callable[[], float] = time.monotonic) -> Progress:
    """Makes of the progress of each stage, which has so many tokens, that of all of them, and tells the time that the
    rest will take. What a stage begins with was kept by an earlier measurement, and took no time.
    """
    began, total = clock(), sum(tokens.values())
    kept: dict[str, float] = {}
    done: dict[str, float] = {}

    def tell(stage: str, share: float) -> None:
        done[stage] = share * tokens[stage]
        kept.setdefault(stage, done[stage])
        all_done = sum(done.values())
        computed = all_done - sum(kept.values())
        eta_s = (clock() - began) * (total - all_done) / computed if computed else None
        stages(f"measuring {stage}", all_done / total, 1, eta_s=eta_s)

    return tell
