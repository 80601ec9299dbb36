"""The steps of a run: experience is taken and written down, the trainer learns from it, and publishes.

What a step learns from stands in the run's folder before the trainer is given it, with the numbers of the operations.
So a driver that goes on after another was killed gives the trainer the same operations under the same numbers: what was
accepted is not computed twice. Answers that were under way are lost, and their prompts with them.
"""

from __future__ import annotations

import io
import json
import struct
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any, NamedTuple, Protocol

import numpy as np

from jobs.events import Emit
from jobs.rl.groups import Asker, Rollouts, Taken, Version
from loray.errors import NotFoundError, TrainingError
from loray.spec import AdapterRef, RlSpec, TrainSpec
from loray.spec.datums import AdamParams, ForwardBackward, LossOutput, OptimStep, op_from_bytes, op_to_bytes
from loray.telemetry import get_logger
from loray.train.optimizer import learning_rate
from loray.train.rl.experience import Experience, Group, Mismatch, experience, mismatch, with_values
from loray.train.rl.prompts import Prompt, Speech

log = get_logger(__name__)

EXPERIENCE = "experience"  # of the step that is trained, or was the last
BEST = "best.zip"  # the version with the highest held-out reward, which is published
_RESULT_S = 20.0  # of a poll
_WARNED_ABOVE = {"float32": 1e-3, "bfloat16": 0.02}  # of the mean mismatch
_STOPPED_ABOVE, _MOST_ABOVE = 0.2, 5
_MOST_WITHOUT_SPREAD = 20  # steps
_ABOUT = "about.json"  # in BEST
_SHOWN, _LONGEST_SHOWN = 5, 400  # answers of a step, and characters of one
_AT_ONCE = 16  # held-out rows
_DIGITS = 6


class TrainerCalls(Protocol):
    """Names the methods that a run calls of a trainer actor (`jobs.trainer`)."""

    async def submit(self, model: str, seq_id: int, op: ForwardBackward | OptimStep) -> None: ...

    async def result(self, model: str, seq_id: int, timeout_s: float) -> Any: ...

    async def publish(self, model: str, kind: str = "ephemeral", keep: int = 3) -> tuple[AdapterRef, str]: ...

    async def give(self, digest: str) -> Mapping[str, bytes]: ...

    async def retire(self, digests: Sequence[str]) -> None: ...


class Retiring(Protocol):
    async def retire(self, digests: Sequence[str]) -> None: ...


class Storage(Protocol):
    """Keeps files by name, as a run's folder does."""

    def read(self, name: str) -> bytes | None: ...

    def write(self, name: str, data: bytes) -> None: ...


_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class Saved:
    """The file `experience`.

    step    1 …, or 0 before the first
    seq_id  of the operation; that of the optimizer step is the next one
    cursor  the next group's index
    told    the figures of its event as far as they are known before it is trained
    fresh   data whose answers are the trained version's own
    scored  by number, what the engine gives the others' tokens after the first under that version
    op      None: there was nothing to learn
    """

    step: int
    seq_id: int
    cursor: int
    told: Mapping[str, Any]
    samples: Sequence[Mapping[str, str]] = ()
    fresh: Sequence[int] = ()
    scored: Mapping[str, Sequence[float]] | None = None
    op: ForwardBackward | None = None

    def to_bytes(self) -> bytes:
        head = {name: getattr(self, name) for name in self.__slots__ if name != "op"}
        data = json.dumps(head).encode()
        return b"".join([_LENGTH.pack(len(data)), data, b"" if self.op is None else op_to_bytes(self.op)])

    @classmethod
    def from_bytes(cls, data: bytes) -> Saved:
        (length,) = _LENGTH.unpack_from(data)
        rest = data[8 + length :]
        op = op_from_bytes(rest) if rest else None
        assert op is None or isinstance(op, ForwardBackward)
        return cls(**json.loads(data[8 : 8 + length]), op=op)


class Told(NamedTuple):
    """Holds what the run's events say already: the last step, the steps that were evaluated, and the tokens that were
    learned.
    """

    step: int = 0
    evaluated: frozenset[int] = frozenset()
    num_tokens: int = 0


class Steps:
    """Runs the steps of one recipe, with one model of a trainer."""

    def __init__(
        self,
        spec: TrainSpec,
        num_steps: int,
        model: str,
        *,
        trainer: TrainerCalls,
        retiring: Retiring,
        asker: Asker,
        prompts: Sequence[Prompt],
        held_out: Sequence[Prompt],
        speech: Speech,
        folder: Storage,
        emit: Emit,
        told: Told = Told(),  # noqa: B008 - it is immutable
        dtype: str = "float32",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`dtype`: in which trainer and engine compute, by which their mismatch is judged."""
        assert isinstance(spec.objective, RlSpec)
        self._spec, self._rl, self._num_steps, self._model = spec, spec.objective, num_steps, model
        self._trainer, self._retiring, self._asker = trainer, retiring, asker
        self._prompts, self._held_out, self._speech = prompts, held_out, speech
        self._folder, self._emit, self._told, self._dtype, self._clock = folder, emit, told, dtype, clock
        self._versions: dict[int, str] = {}  # digests that are kept, by the number of updates
        self._num_skipped = self._num_above = self._num_without_spread = 0
        self._num_tokens = told.num_tokens
        self._seq_id = 1  # the next one
        self._durations: list[float] = []
        self._best: float | None = None
        self._failure = ""  # that was told last
        self._warned = 0.0  # the mismatch that was told last

    async def run(self, next_seq: int) -> None:
        """Run all steps that are left, or until there is nothing left to learn. Afterwards the folder has the version
        to publish. `next_seq`: the number of the trainer's next operation of the model.

        Raises TrainingError where there is nothing to learn, trainer and engine compute different models, or the
        trainer does not have the model any more with which the run began.
        """
        saved = self._read()
        if next_seq < saved.seq_id:
            raise TrainingError(
                f"the trainer has lost the model of this run: it is at operation {next_seq}, and the run at "
                f"{saved.seq_id}; train without --resume"
            )
        version = await self._publish()
        rollouts = Rollouts(self._asker, self._prompts, self._rl, seed=self._spec.seed, cursor=saved.cursor)
        try:
            if saved.step:
                version = await self._finish(saved, version, {})
            await self._evaluate(saved.step, version)
            for step in range(saved.step + 1, self._num_steps + 1):
                began = self._clock()
                rollouts.use(version)
                taken = await rollouts.take()
                sampled = self._clock()
                saved = await self._save(step, taken, version, rollouts.cursor)
                version = await self._finish(saved, version, {"began": began, "sampled": sampled})
                is_over = self._has_nothing_to_learn(saved, version)
                await self._evaluate(step, version, is_last=is_over)
                if is_over:
                    break
        finally:
            await rollouts.close()
        if not self._keeps_best or self._best is None:
            await self._keep(version, saved.step, None)

    @property
    def _keeps_best(self) -> bool:
        return self._spec.evaluation.keep_best and bool(self._held_out)

    def _read(self) -> Saved:
        data = self._folder.read(EXPERIENCE)
        if data is None:
            return Saved(0, 0, 0, {})
        saved = Saved.from_bytes(data)
        kept = self._folder.read(BEST)
        if kept is not None:
            self._best = kept_version(kept)[0].get("reward")
        self._seq_id = saved.seq_id
        return saved

    async def _save(self, step: int, taken: Taken, version: Version, cursor: int) -> Saved:
        """Write down what the step learns from."""
        if self._asker.last_failure != self._failure:
            self._failure = self._asker.last_failure
            self._emit({"event": "warning", "message": f"an answer got no reward: {self._failure}"})
        found = experience(self._model, taken.groups, self._rl)
        told = _figures(taken, found, version)
        fresh: list[int] = []
        scored: dict[str, list[float]] = {}
        self._num_without_spread = 0 if told["groups_kept"] else self._num_without_spread + 1
        if found is not None:
            fresh = [i for i, number in enumerate(found.versions) if number == version.number]
            older = [i for i, number in enumerate(found.versions) if number != version.number]
            if self._rl.values == "trainer" and fresh:
                older = []
            elif self._rl.values == "trainer":
                older = older[: self._rl.group_size]  # one group's is enough to compare
            values = await self._asker.score([found.episodes[i] for i in older], version)
            by_number = dict(zip(older, values, strict=True))
            scored = {str(i): value[1:].tolist() for i, value in by_number.items()}
            if self._rl.values == "engine":
                found = with_values(
                    found, [by_number.get(i, episode.logprobs) for i, episode in enumerate(found.episodes)]
                )
        saved = Saved(
            step,
            self._seq_id,
            cursor,
            told,
            self._shown(taken.groups),
            fresh,
            scored,
            None if found is None else found.op,
        )
        self._folder.write(EXPERIENCE, saved.to_bytes())
        return saved

    async def _finish(self, saved: Saved, version: Version, times: Mapping[str, float]) -> Version:
        """Train what was written down, publish, and tell; returns the version after it."""
        began = self._clock()
        trained: dict[str, Any] = {}
        if saved.op is not None:
            trained = await self._train(saved, saved.op)
        trained_at = self._clock()
        if trained.get("is_updated"):
            version = await self._publish()
            await self._retire(version)
        published_at = self._clock()
        if saved.step > self._told.step:
            seconds = {"train_s": trained_at - began, "publish_s": published_at - trained_at}
            if times:
                seconds["sample_s"] = times["sampled"] - times["began"]
                self._durations.append(published_at - times["began"])
            self._tell(saved, version, trained, seconds)
        return version

    def _has_nothing_to_learn(self, saved: Saved, version: Version) -> bool:
        """Tell whether all answers of many steps had the same reward. Raises TrainingError where that was so from the
        beginning.
        """
        if self._num_without_spread < _MOST_WITHOUT_SPREAD:
            return False
        same = (
            f"every answer gets the same reward ({saved.told['reward_mean']:g}) in {_MOST_WITHOUT_SPREAD} steps: "
            "there is nothing"
        )
        if not version.number:
            raise TrainingError(
                f"{same} to learn from; make the task easier, show an example in the prompt, or give a reward between "
                "the two"
            )
        self._emit({"event": "warning", "message": f"{same} left to learn, and the run ends at step {saved.step}"})
        return True

    async def _train(self, saved: Saved, op: ForwardBackward) -> dict[str, Any]:
        """Have the trainer learn; what it has done already it does not do again."""
        seq_id, self._seq_id = saved.seq_id, saved.seq_id + 1
        rate = learning_rate(saved.step, self._num_steps, self._spec.optimizer)
        found: dict[str, Any] = {"lr": rate, "loss": None, "grad_norm": None, "num_tokens": op.num_tokens}
        await self._trainer.submit(self._model, seq_id, op)
        try:
            output: LossOutput | None = await self._result(seq_id)
        except TrainingError as e:  # it is not finite
            self._skip(saved.step, e)
            return found
        if output is not None:
            found |= {"loss": output.loss, "apart": self._compared(saved, op, output), "metrics": dict(output.metrics)}
            self._guard(saved.step, found["apart"])
        optimizer = self._spec.optimizer
        adam = AdamParams(
            learning_rate=rate,
            beta1=optimizer.beta1,
            beta2=optimizer.beta2,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            grad_clip_norm=optimizer.max_grad_norm or 0.0,
        )
        self._seq_id = seq_id + 2
        await self._trainer.submit(self._model, seq_id + 1, OptimStep(self._model, adam))
        try:
            stepped: Mapping[str, float] | None = await self._result(seq_id + 1)
        except TrainingError as e:
            self._skip(saved.step, e)
            return found
        self._num_skipped = 0
        return found | {"grad_norm": (stepped or {}).get("grad_norm"), "is_updated": True}

    def _skip(self, step: int, error: TrainingError) -> None:
        self._num_skipped += 1
        log.warning("step %d is skipped: %s", step, error)
        if self._num_skipped >= self._spec.max_nonfinite_steps:
            raise TrainingError(f"{self._num_skipped} steps in a row were skipped: {error}; lower the learning rate")

    async def _result(self, seq_id: int) -> Any:
        """Wait for a result; None where a driver before this one has had it."""
        try:
            while (found := await self._trainer.result(self._model, seq_id, _RESULT_S)) is None:
                pass
        except NotFoundError:
            return None
        return found

    def _compared(self, saved: Saved, op: ForwardBackward, output: LossOutput) -> Mismatch | None:
        """Compare trainer and engine on answers of the trained version; None where there is none."""
        scored = {int(i): np.array(values, np.float32) for i, values in (saved.scored or {}).items()}
        own = {i: logprobs for i in saved.fresh if (logprobs := op.datums[i].logprobs) is not None}
        pairs = sorted({**scored, **own}.items())
        if not pairs:
            return None
        answers = [weights != 0 for i, _ in pairs if (weights := op.datums[i].weights) is not None]
        return mismatch([output.logprobs[i] for i, _ in pairs], [values for _, values in pairs], answers)

    def _guard(self, step: int, apart: Mismatch | None) -> None:
        if apart is None:
            return
        self._num_above = self._num_above + 1 if apart.mean > _STOPPED_ABOVE else 0
        if self._num_above >= _MOST_ABOVE:
            raise TrainingError(
                "trainer and engine compute different models: their log-probabilities of the same tokens are "
                f"{apart.mean:.3g} apart in the mean, in {_MOST_ABOVE} steps one after the other; serve the base in "
                "the dtype that it is trained in, without a quantised KV cache"
            )
        bound = _WARNED_ABOVE.get(self._dtype, _WARNED_ABOVE["bfloat16"])
        if apart.mean > max(bound, 2 * self._warned):  # not in each step
            self._warned = apart.mean
            message = f"trainer and engine are {apart.mean:.3g} apart in log-probabilities, at most {apart.max:.3g}"
            self._emit({"event": "warning", "message": f"step {step}: {message}"})

    async def _publish(self) -> Version:
        ref, holder = await self._trainer.publish(self._model, "ephemeral", self._rl.max_staleness + 2)
        version = Version(ref.version, ref, (holder,))
        self._versions[version.number] = ref.digest
        return version

    async def _retire(self, version: Version) -> None:
        """Let go of versions that no group may have any more."""
        old = [number for number in self._versions if number < version.number - self._rl.max_staleness]
        gone = {self._versions.pop(number) for number in old} - {*self._versions.values()}
        if gone:
            await self._retiring.retire(sorted(gone))
            await self._trainer.retire(sorted(gone))

    async def _evaluate(self, step: int, version: Version, *, is_last: bool = False) -> None:
        """Reward greedy answers to held-out rows, before the first step, after the last, and where one is due."""
        every = self._spec.evaluation.interval_steps
        is_due = is_last or step in (0, self._num_steps) or (every is not None and step % every == 0)
        if not self._held_out or not is_due or step in self._told.evaluated:
            return
        found = await self._asker.greedy(self._held_out, version, at_once=_AT_ONCE)
        rewards = [episode.reward for episode in found if episode is not None]
        if not rewards:
            self._emit({"event": "warning", "message": f"step {step}: no held-out answer got a reward"})
            return
        reward = fmean(rewards)
        if self._keeps_best and step and (self._best is None or reward >= self._best):
            self._best = reward
            await self._keep(version, step, reward)
        subject = "adapter" if step or self._spec.init_adapter else "base"
        event: dict[str, Any] = {"event": "eval", "step": step, "subject": subject, "eval_loss": None, "reward": reward}
        self._emit(event)  # type: ignore[arg-type]

    async def _keep(self, version: Version, step: int, reward: float | None) -> None:
        """Keep a version's files in the folder, to be published with the same digest."""
        files = await self._trainer.give(version.digest)
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            about = {"step": step, "reward": reward, "digest": version.digest}
            archive.writestr(_ABOUT, json.dumps(about))
            for name, data in files.items():
                archive.writestr(name, bytes(data))
        self._folder.write(BEST, buffer.getvalue())

    def _shown(self, groups: Sequence[Group]) -> list[dict[str, str]]:
        shown = [(group, episode) for group in groups for episode in group.episodes]
        return [
            {
                "prompt": self._speech.text(self._prompts[group.prompt].ids)[-_LONGEST_SHOWN:].strip(),
                "answer": episode.text[:_LONGEST_SHOWN],
                "reward": f"{episode.reward:g}",
                "version": f"{group.version} ({group.digest[:12]})",
            }
            for group, episode in shown[:: max(1, len(shown) // _SHOWN)][:_SHOWN]
        ]

    def _tell(self, saved: Saved, version: Version, trained: Mapping[str, Any], seconds: Mapping[str, float]) -> None:
        apart: Mismatch | None = trained.get("apart")
        metrics = {**saved.told, **trained.get("metrics", {}), **seconds}
        if apart is not None:
            metrics |= {"mismatch_mean": apart.mean, "mismatch_max": apart.max, "mismatch_k3": apart.k3}
            metrics["mismatch_share"] = apart.share
        self._emit(
            {
                "event": "rollout",
                "step": saved.step,
                "num_steps": self._num_steps,
                "version": version.number,
                "digest": version.digest,
                "metrics": {
                    name: round(value, _DIGITS) if isinstance(value, float) else value
                    for name, value in metrics.items()
                },
                "samples": [dict(sample) for sample in saved.samples],
            }
        )
        if not trained:
            return
        self._num_tokens += trained["num_tokens"]
        lasted = self._durations[-1] if self._durations else sum(seconds.values())
        typical = fmean(self._durations[-20:]) if self._durations else lasted
        event: dict[str, Any] = {
            "event": "step",
            "step": saved.step,
            "num_steps": self._num_steps,
            "epoch": saved.cursor // len(self._prompts),
            "loss": trained["loss"],
            "lr": trained["lr"],
            "grad_norm": trained["grad_norm"],
            "tokens_per_s": trained["num_tokens"] / max(lasted, 1e-9),
            "num_tokens": self._num_tokens,
            "skipped_steps": self._num_skipped,
            "eta_s": typical * (self._num_steps - saved.step),
            "reward": saved.told["reward_mean"],
        }
        if apart is not None:
            event["mismatch"] = apart.mean
        self._emit(event)  # type: ignore[arg-type]


def kept_version(data: bytes) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Read a version that `Steps` has kept: what is known of it, and its files."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    return json.loads(files.pop(_ABOUT)), files


def _figures(taken: Taken, found: Experience | None, version: Version) -> dict[str, Any]:
    rewards = [reward for group in taken.groups for reward in group.rewards]
    episodes = [episode for group in taken.groups for episode in group.episodes]
    kept = sum(max(group.rewards) > min(group.rewards) for group in taken.groups)
    return {
        "reward_mean": fmean(rewards),
        "reward_std": pstdev(rewards),
        "groups_kept": kept,
        "groups_dropped": len(taken.groups) - kept,
        "groups_failed": taken.num_failed,
        "answers_failed": sum(group.num_failed for group in taken.groups),
        "dropped_stale": taken.num_stale,
        "staleness": fmean(version.number - group.version for group in taken.groups),
        "answer_tokens": sum(episode.num_answer_tokens for episode in episodes),
        "answers_cut": sum(episode.is_cut for episode in episodes),
        "answers_trained": 0 if found is None else len(found.episodes),
    }
