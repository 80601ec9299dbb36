"""The steps of reinforcement learning against a trainer and a deployment of one number a token: what is sampled by
whom, what is dropped, what is learned once after a driver was killed.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from ray.exceptions import RayActorError

from jobs.events import Event
from jobs.rl import groups
from jobs.rl.groups import Asker
from jobs.rl.steps import BEST, EXPERIENCE, Saved, Steps, Told, kept_version
from loray.errors import NotFoundError, TrainingError
from loray.recipes.load import load_recipe
from loray.spec import RlSpec, TrainSpec
from loray.spec.datums import ForwardBackward, OptimStep
from loray.train.rl.prompts import Prompt
from tests.fixtures.rollouts import END, ToyFolder, ToySampler, ToyScoring, ToySpeech, ToyTrainer

PROMPTS = tuple(Prompt({"answer": "7"}, (0, i)) for i in range(6))


def recipe(*, steps: int = 12, evaluation: dict[str, Any] | None = None, **objective: Any) -> TrainSpec:
    fields = {"type": "rl", "reward": {"builtin": "exact", "field": "answer"}, "group_size": 8, "prompts_per_step": 2}
    if "environment" in objective:
        del fields["reward"]
    over = {
        "name": "toy",
        "objective": {**fields, "max_tokens": 4, "advantage": "center", **objective},
        "data": {"train": "rows.jsonl"},
        "optimizer": {"learning_rate": 0.1, "schedule": "constant"},
        "max_steps": steps,
        "evaluation": evaluation or {"interval_steps": 4},
    }
    return load_recipe(over=over).spec


class World:
    """What a driver finds, and drivers that come one after the other."""

    def __init__(self, spec: TrainSpec, rate: float = 2.0) -> None:
        assert isinstance(spec.objective, RlSpec)
        self.spec, self.objective = spec, spec.objective
        self.trainer, self.scoring, self.folder = ToyTrainer(rate), ToyScoring(), ToyFolder()
        self.sampler = ToySampler(self.trainer)
        self.events: list[dict[str, Any]] = []

    def drive(self, trainer: Any = None) -> None:
        speech: Any = ToySpeech()
        asker = Asker(
            "tiny",
            self.objective,
            self.sampler,
            self.scoring,
            speech,
            tenant="default",
            seed=1,
            max_length=32,
            stop_ids=frozenset([END]),
        )
        steps = Steps(
            self.spec,
            self.spec.max_steps or 0,
            "toy",
            trainer=trainer or self.trainer,
            retiring=self.sampler,
            asker=asker,
            prompts=PROMPTS,
            held_out=PROMPTS[:3],
            speech=speech,
            folder=self.folder,
            emit=self._take,
            told=self._told(),
            clock=lambda: 0.0,
        )
        asyncio.run(steps.run(len(self.trainer.accepted) + 1))

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == kind]

    def _take(self, event: Event) -> None:
        self.events.append(dict(event))

    def _told(self) -> Told:
        evaluated = frozenset(event["step"] for event in self.of("eval"))
        num_tokens = max((event["num_tokens"] for event in self.of("step")), default=0)
        return Told(max((event["step"] for event in self.of("rollout")), default=0), evaluated, num_tokens)


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_what_is_rewarded_is_learned(staleness: int) -> None:
    world = World(recipe(steps=30, max_staleness=staleness))
    world.drive()
    rewards = [event["metrics"]["reward_mean"] for event in world.of("rollout")]
    assert np.mean(rewards[-5:]) > np.mean(rewards[:3]) + (0.5 if staleness < 2 else 0.1)
    assert [event["step"] for event in world.of("rollout")] == list(range(1, 31))
    assert [event["reward"] for event in world.of("eval")][-1] == 1.0
    stale = [event["metrics"]["staleness"] for event in world.of("rollout")]
    assert max(stale) <= staleness
    assert (max(stale) > 0) == (staleness > 0)
    mismatches = [event["metrics"]["mismatch_max"] for event in world.of("rollout") if event["metrics"]["groups_kept"]]
    assert mismatches
    assert max(mismatches) < 1e-6  # fp32's rounding


def test_a_step_learns_only_from_versions_within_the_bound() -> None:
    world = World(recipe(steps=6, max_staleness=1))
    seed, event = 1_000_003 + 1 * 8, asyncio.Event()  # of the second group, which ends after three steps
    world.sampler.held[seed] = event
    taken = world._take

    def release(told: Event) -> None:
        taken(told)
        if told["event"] == "rollout" and told["step"] == 3:
            event.set()

    world._take = release  # type: ignore[method-assign]
    world.drive()
    assert sum(told["metrics"]["dropped_stale"] for told in world.of("rollout")) == 1
    assert len(world.of("rollout")) == 6
    for op in world.trainer.accepted.values():
        if isinstance(op, ForwardBackward):
            assert len(op.datums) % 8 == 0


def test_old_versions_are_let_go_and_kept_ones_are_not() -> None:
    world = World(recipe(steps=10, max_staleness=1))
    world.drive()
    assert world.sampler.retired == world.trainer.retired
    assert len(world.trainer.weights) - len(world.sampler.retired) <= 3
    used = {call.adapter.digest for call in world.sampler.calls if call.adapter is not None}
    assert used >= {*world.sampler.retired}


def test_the_best_version_is_kept_with_its_digest() -> None:
    world = World(recipe(steps=8))
    world.drive()
    about, files = kept_version(world.folder.files[BEST])
    rewards = {event["step"]: event["reward"] for event in world.of("eval")}
    assert about["reward"] == max(reward for step, reward in rewards.items() if step)
    digest = next(event["digest"] for event in world.of("rollout") if event["step"] == about["step"])
    assert about["digest"] == digest
    assert files == {"weights": world.trainer.weights[digest].numpy().tobytes()}


def test_without_held_out_measurement_the_last_one_is_kept() -> None:
    world = World(recipe(steps=5, evaluation={"keep_best": False}))
    world.drive()
    assert kept_version(world.folder.files[BEST])[0]["digest"] == world.of("rollout")[-1]["digest"]


class Killed(BaseException):
    pass


class Deadly:
    """A trainer whose caller is killed at the n-th call of a method, before or after it was done."""

    def __init__(self, trainer: ToyTrainer, method: str, nth: int, *, is_done: bool) -> None:
        self._trainer, self._method, self._left, self._is_done = trainer, method, nth, is_done

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._trainer, name)

        async def call(*args: Any) -> Any:
            if name == self._method:
                self._left -= 1
                if self._left == 0 and not self._is_done:
                    raise Killed
            found = await method(*args)
            if name == self._method and self._left == 0:
                raise Killed
            return found

        return call


@pytest.mark.parametrize("is_done", [False, True])
@pytest.mark.parametrize(
    ("method", "nth"), [("submit", 5), ("submit", 6), ("result", 5), ("result", 6), ("publish", 4)]
)
def test_after_a_killed_driver_steps_are_counted_once(method: str, nth: int, is_done: bool) -> None:
    world = World(recipe(steps=8, max_staleness=1, advantage="none", loss="importance_sampling"))
    with pytest.raises(Killed):
        world.drive(Deadly(world.trainer, method, nth, is_done=is_done))
    done = len(world.of("rollout"))
    assert 1 <= done < 8
    world.drive()
    assert [event["step"] for event in world.of("rollout")] == list(range(1, 9))
    assert Counter(event["step"] for event in world.of("eval")) == {0: 1, 4: 1, 8: 1}
    steps = [op for op in world.trainer.accepted.values() if isinstance(op, OptimStep)]
    learned = [event for event in world.of("rollout") if event["metrics"]["groups_kept"]]
    assert len(steps) == world.trainer.num_updates == len(learned)
    ops = [op for op in world.trainer.accepted.values() if isinstance(op, ForwardBackward)]
    assert world.of("step")[-1]["num_tokens"] == sum(op.num_tokens for op in ops)
    world.drive()  # there is nothing left to do
    assert world.trainer.num_updates == len(learned)


def test_results_that_a_killed_driver_had_are_not_needed_again() -> None:
    world = World(recipe(steps=4, max_staleness=0))
    with pytest.raises(Killed):
        world.drive(Deadly(world.trainer, "publish", 3, is_done=False))  # after the second step was learned
    num_updates = world.trainer.num_updates
    world.trainer.results = dict.fromkeys(world.trainer.results, NotFoundError("the result is not kept any more"))
    world.drive()
    assert [event["step"] for event in world.of("rollout")] == [1, 2, 3, 4]
    assert num_updates < world.trainer.num_updates <= 4


def test_a_lost_model_is_an_error() -> None:
    world = World(recipe(steps=4))
    with pytest.raises(Killed):
        world.drive(Deadly(world.trainer, "publish", 3, is_done=True))
    world.trainer = ToyTrainer()
    with pytest.raises(TrainingError, match="has lost the model of this run"):
        world.drive()


def test_the_same_reward_everywhere_is_an_error() -> None:
    world = World(recipe(steps=40, reward={"builtin": "regex", "pattern": "x"}))
    world.scoring.reward = lambda row, answer: asyncio.sleep(0, 0.0)  # type: ignore[assignment, method-assign]
    with pytest.raises(TrainingError, match=r"every answer gets the same reward \(0\) in 20 steps"):
        world.drive()
    assert world.trainer.num_updates == 0


def test_a_run_that_has_learned_all_ends_early_with_its_version() -> None:
    world = World(recipe(steps=60, reward={"builtin": "regex", "pattern": "x"}))
    learned = world.scoring.reward

    async def reward(row: Mapping[str, Any], answer: str) -> float:
        return await learned(row, answer) if world.trainer.num_updates < 3 else 1.0

    world.scoring.reward = reward  # type: ignore[assignment, method-assign]
    world.drive()
    (warning,) = (e["message"] for e in world.of("warning") if "same reward" in e["message"])
    last = world.of("rollout")[-1]["step"]
    assert warning.endswith(f"nothing left to learn, and the run ends at step {last}")
    assert last < 60
    assert world.of("eval")[-1]["step"] == last
    about, _ = kept_version(world.folder.files[BEST])
    assert about["step"] == last


def test_a_trainer_that_computes_another_model_is_stopped() -> None:
    world = World(recipe(steps=12, max_staleness=0))
    world.trainer.apart = 0.3
    with pytest.raises(TrainingError, match="trainer and engine compute different models"):
        world.drive()
    warnings = [event["message"] for event in world.of("warning")]
    assert len(warnings) == 1  # it does not grow
    assert "0.3 apart" in warnings[0]
    assert world.trainer.num_updates == 4


def test_values_of_the_engine_leave_no_ratio_but_one() -> None:
    world = World(recipe(steps=6, max_staleness=1, values="engine"))
    world.drive()
    ops = [op for op in world.trainer.accepted.values() if isinstance(op, ForwardBackward)]
    for op in ops:
        for datum in op.datums:
            assert datum.values is not None
    stale = [not np.array_equal(d.values, d.logprobs) for op in ops for d in op.datums]  # type: ignore[arg-type]
    assert any(stale)
    assert not all(stale)


def test_answers_without_a_reward_are_left_out() -> None:
    world = World(recipe(steps=4))
    world.scoring.failures = {"3": 10_000}
    world.drive()
    metrics = [event["metrics"] for event in world.of("rollout")]
    assert sum(m["answers_failed"] for m in metrics) > 0
    world = World(recipe(steps=4))
    world.scoring.failures = {str(i): 10_000 for i in range(10)}
    with pytest.raises(TrainingError, match="no reward today"):
        world.drive()


def test_a_reward_is_tried_twice() -> None:
    world = World(recipe(steps=1))
    world.scoring.failures = dict.fromkeys(map(str, range(10)), 1)
    world.drive()
    assert world.of("rollout")[0]["metrics"]["answers_failed"] == 0


def test_a_lost_gateway_is_asked_again_with_the_same_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "_BACK_OFF_S", (0.0, 0.0))
    world = World(recipe(steps=2, max_staleness=0))
    world.sampler.failures = [RayActorError(), RayActorError()]
    world.drive()
    calls = Counter((call.prompt_ids, call.params.seed, call.params.temperature) for call in world.sampler.calls)
    assert sorted(calls.values())[-1] > 1
    assert len(world.of("rollout")) == 2


def test_observations_are_not_learned() -> None:
    world = World(recipe(steps=2, environment="their:Environment"))
    world.drive()
    op = world.trainer.accepted[1]
    assert isinstance(op, ForwardBackward)
    for datum in op.datums:
        # prompt 0 i, answer a END, observation 0 0, answer b END
        assert datum.weights is not None
        assert datum.weights.tolist() == [0, 1, 1, 0, 0, 1, 1]
        assert datum.token_ids[4:6].tolist() == [0, 0]


def test_what_is_written_down_is_read_again() -> None:
    world = World(recipe(steps=1))
    world.drive()
    saved = Saved.from_bytes(world.folder.files[EXPERIENCE])
    assert saved.to_bytes() == world.folder.files[EXPERIENCE]
    assert saved.step == 1
