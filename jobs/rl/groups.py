"""Groups of answers: sampled ahead of the trainer as far as a recipe allows, rewarded, and taken when they are whole.

A group is sampled by one version from its first to its last token. Which version that is, is decided when it begins.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
from ray.exceptions import RayError

from jobs.rl.environments import EpisodeFailed
from loray.errors import AdapterGone, Overloaded, TrainingError
from loray.spec import AdapterRef, RlSpec, SampleCall, SampledSequence, SampleResult, SamplingParams
from loray.telemetry import get_logger
from loray.train.rl.experience import Episode, Floats, Group
from loray.train.rl.prompts import Prompt, Speech
from loray.train.rl.rewards import Said, Turn

log = get_logger(__name__)

_TRIES = 2  # of an episode whose code fails
_LOST_S = 600.0  # that a gateway may be away
_BACK_OFF_S = (0.5, 5.0)
_MOST_FAILED = 4  # times the groups of a step, one after the other without one that is whole
_MOST_TURNS = 64


class Sampling(Protocol):
    """The gateways' method; `jobs.sampling.Sampler`, and what stands for it in tests."""

    async def sample(self, call: SampleCall) -> SampleResult: ...


class Scoring(Protocol):
    """Starts rows and rewards answers; `jobs.rl.environments.Environments`, and what stands for it in tests."""

    async def start(self, key: str, row: Mapping[str, Any]) -> tuple[Any, Said]: ...

    async def step(self, place: Any, answer: str) -> Turn: ...

    async def reward(self, row: Mapping[str, Any], answer: str) -> float: ...


@dataclass(frozen=True, slots=True)
class Version:
    """Weights after `number` updates. `adapter` None: the base alone."""

    number: int
    adapter: AdapterRef | None
    holders: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        return "" if self.adapter is None else self.adapter.digest


class Asker:
    """Asks the deployment for answers, and environments for rewards."""

    def __init__(
        self,
        base: str,
        spec: RlSpec,
        sampler: Sampling,
        scoring: Scoring,
        speech: Speech,
        *,
        tenant: str,
        seed: int,
        max_length: int,
        stop_ids: frozenset[int],
    ) -> None:
        """`max_length` bounds an episode, in tokens; `stop_ids` end an answer."""
        self._base, self._spec, self._sampler, self._scoring = base, spec, sampler, scoring
        self._speech, self._tenant, self._seed = speech, tenant, seed
        self._max_length, self._stop_ids = max_length, stop_ids
        self.last_failure = ""  # of a reward or an environment, for people

    async def group(self, index: int, number: int, prompt: Prompt, version: Version) -> Group:
        """Sample and reward the answers to a prompt: the group `index` of the run, of row `number`."""
        began, size = time.monotonic(), self._spec.group_size
        seed = (self._seed * 1_000_003 + index * size) % (1 << 31)
        if self._spec.environment is not None:
            made = await asyncio.gather(
                *(self._episode(f"{index}.{i}", prompt, version, seed + i, temperature=1.0) for i in range(size))
            )
        else:
            result = await self._sample(prompt.ids, version, seed, num_samples=size)
            made = await asyncio.gather(*(self._rewarded(prompt, sequence) for sequence in result.sequences))
        episodes = tuple(episode for episode in made if episode is not None)
        failed = len(made) - len(episodes)
        return Group(index, number, version.number, version.digest, episodes, failed, time.monotonic() - began)

    async def greedy(self, prompts: Sequence[Prompt], version: Version, *, at_once: int) -> list[Episode | None]:
        """Answer prompts greedily, and reward the answers; None where a reward failed."""
        turn = asyncio.Semaphore(at_once)

        async def answer(i: int, prompt: Prompt) -> Episode | None:
            async with turn:
                if self._spec.environment is not None:
                    return await self._episode(f"eval.{version.number}.{i}", prompt, version, 0, temperature=0.0)
                result = await self._sample(prompt.ids, version, 0, temperature=0.0)
                return await self._rewarded(prompt, result.sequences[0])

        return list(await asyncio.gather(*(answer(i, prompt) for i, prompt in enumerate(prompts))))

    async def score(self, episodes: Sequence[Episode], version: Version) -> list[Floats]:
        """Ask what the engine gives each token of episodes under a version, (T,); 0 for the first."""

        async def scored(episode: Episode) -> Floats:
            ids = tuple(map(int, episode.token_ids))
            params = SamplingParams(max_tokens=0, prompt_logprobs=0)
            result = await self._call(SampleCall(params=params, **self._facts(ids, version)))
            assert result.prompt_logprobs is not None
            return np.array([0.0, *result.prompt_logprobs], np.float32)

        return list(await asyncio.gather(*map(scored, episodes)))

    async def _rewarded(self, prompt: Prompt, sequence: SampledSequence) -> Episode | None:
        """Make an episode of an answer to a row's own prompt; None where its reward failed twice."""
        text = self._speech.text(sequence.token_ids)
        for _ in range(_TRIES):
            try:
                reward = await self._scoring.reward(prompt.row, text)
                return _Transcript(prompt.ids).answered(sequence).episode(reward, text)
            except EpisodeFailed as e:
                log.debug("a reward failed: %s", e)
                self.last_failure = str(e)
        return None

    async def _episode(
        self, key: str, prompt: Prompt, version: Version, seed: int, *, temperature: float
    ) -> Episode | None:
        """Play an episode of an environment; None where it failed twice."""
        for attempt in range(_TRIES):
            try:
                return await self._played(f"{key}.{attempt}", prompt, version, seed, temperature)
            except (EpisodeFailed, ValueError) as e:
                log.debug("an episode failed: %s", e)
                self.last_failure = str(e)
        return None

    async def _played(self, key: str, prompt: Prompt, version: Version, seed: int, temperature: float) -> Episode:
        place, said = await self._scoring.start(key, prompt.row)
        transcript = _Transcript(self._speech.prompt(said) if said else prompt.ids)
        reward, texts = 0.0, []
        for turn in range(_MOST_TURNS):
            left = self._max_length - len(transcript.ids)
            if left < 1:
                break
            result = await self._sample(
                tuple(transcript.ids), version, seed + turn * 7919, temperature=temperature, most=left
            )
            (sequence,) = result.sequences
            transcript = transcript.answered(sequence)
            texts.append(self._speech.text(sequence.token_ids))
            taken = await self._scoring.step(place, texts[-1])
            reward += taken.reward
            if taken.done:
                break
            ended = bool(sequence.token_ids) and sequence.token_ids[-1] in self._stop_ids
            transcript = transcript.told(self._speech.observation(taken.observation, ended=ended))
        return transcript.episode(reward, "\n".join(texts))

    async def _sample(
        self,
        prompt_ids: tuple[int, ...],
        version: Version,
        seed: int,
        *,
        num_samples: int = 1,
        temperature: float = 1.0,
        most: int | None = None,
    ) -> SampleResult:
        tokens = min(self._spec.max_tokens, most or self._spec.max_tokens)
        params = SamplingParams(max_tokens=tokens, temperature=temperature, seed=seed, logprobs=0)
        return await self._call(SampleCall(params=params, num_samples=num_samples, **self._facts(prompt_ids, version)))

    def _facts(self, prompt_ids: tuple[int, ...], version: Version) -> dict[str, Any]:
        return {
            "base": self._base,
            "adapter": version.adapter,
            "prompt_ids": prompt_ids,
            "tenant": self._tenant,
            "holders": version.holders,
        }

    async def _call(self, call: SampleCall) -> SampleResult:
        """Send a call, again and with the same seeds where the gateway is lost or has no room."""
        least, most = _BACK_OFF_S
        wait, until = least, time.monotonic() + _LOST_S
        while True:
            try:
                return await self._sampler.sample(call)
            except (RayError, Overloaded) as e:
                if time.monotonic() > until:
                    raise
                log.warning("the deployment does not sample, trying again: %s", e)
                await asyncio.sleep(wait)
                wait = min(2 * wait, most)


@dataclass(frozen=True, slots=True)
class _Transcript:
    """The tokens of an episode so far. Tokens that were sampled stay as they are."""

    ids: tuple[int, ...]
    is_answer: tuple[bool, ...] = ()
    logprobs: tuple[float, ...] = ()
    is_cut: bool = False

    def __post_init__(self) -> None:
        missing = len(self.ids) - len(self.is_answer)
        object.__setattr__(self, "is_answer", (*self.is_answer, *(False,) * missing))
        object.__setattr__(self, "logprobs", (*self.logprobs, *(0.0,) * missing))

    def answered(self, sequence: SampledSequence) -> _Transcript:
        return _Transcript(
            (*self.ids, *sequence.token_ids),
            (*self.is_answer, *(True,) * len(sequence.token_ids)),
            (*self.logprobs, *sequence.logprobs),
            self.is_cut or sequence.stop_reason == "length",
        )

    def told(self, observation: tuple[int, ...]) -> _Transcript:
        return replace(self, ids=(*self.ids, *observation))

    def episode(self, reward: float, text: str) -> Episode:
        return Episode(
            np.array(self.ids, np.int32),
            np.array(self.is_answer, np.bool_),
            np.array(self.logprobs, np.float32),
            reward,
            self.is_cut,
            text,
        )


class Taken(NamedTuple):
    """The groups of a step, and how many were dropped: those that were too old, and those without two rewards."""

    groups: tuple[Group, ...]
    num_stale: int
    num_failed: int


class Rollouts:
    """Groups under way and groups that wait, of which the trainer takes those of its next step.

    At most `max_staleness` + 1 steps' groups are begun and not taken. The order of prompts is drawn anew for each
    epoch; group i of the run has the place i in it, whatever became of the groups before.
    """

    def __init__(self, asker: Asker, prompts: Sequence[Prompt], spec: RlSpec, *, seed: int, cursor: int = 0) -> None:
        self._asker, self._prompts, self._spec, self._seed = asker, prompts, spec, seed
        self.cursor = cursor  # the next group's index
        self._version: Version | None = None
        self._running: dict[int, tuple[int, asyncio.Task[Group]]] = {}  # by index: version, task

    def use(self, version: Version) -> None:
        """Sample with this version from now on, and begin what may begin."""
        self._version = version
        self._fill()

    async def take(self) -> Taken:
        """Wait for the groups of a step, the first begun first, and begin others in their place.

        Those whose version is more than `max_staleness` updates behind are dropped. Raises what sampling raises, and
        TrainingError where no group gets rewards.
        """
        assert self._version is not None
        spec, version, num_stale, num_failed = self._spec, self._version, 0, 0
        found: list[Group] = []
        while True:
            for index, (number, task) in sorted(self._running.items()):
                if number < version.number - spec.max_staleness:
                    task.cancel()
                    del self._running[index]
                    num_stale += 1
                elif task.done() and len(found) < spec.prompts_per_step:
                    del self._running[index]
                    try:
                        group = task.result()
                    except AdapterGone:  # its version was retired, or its bytes are lost: the prompt is lost with it
                        num_stale += 1
                        continue
                    if len(group.episodes) < 2:
                        num_failed += 1
                        continue
                    found.append(group)
            if num_failed >= _MOST_FAILED * spec.prompts_per_step and not found:
                raise TrainingError(
                    f"{num_failed} groups one after the other got no reward; the last failure was: "
                    f"{self._asker.last_failure}; correct the reward, and go on with --resume"
                )
            if len(found) == spec.prompts_per_step:
                return Taken(tuple(found), num_stale, num_failed)
            self._fill(len(found))
            await asyncio.wait([task for _, task in self._running.values()], return_when=asyncio.FIRST_COMPLETED)

    async def close(self) -> None:
        """Give up what is under way."""
        tasks = [task for _, task in self._running.values()]
        self._running.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _fill(self, num_found: int = 0) -> None:
        assert self._version is not None
        most = (self._spec.max_staleness + 1) * self._spec.prompts_per_step
        while len(self._running) + num_found < most:
            index, number = self.cursor, self.prompt_of(self.cursor)
            group = self._asker.group(index, number, self._prompts[number], self._version)
            self._running[index] = (self._version.number, asyncio.ensure_future(group))
            self.cursor += 1

    def prompt_of(self, index: int) -> int:
        """Draw the row of group `index`."""
        epoch, place = divmod(index, len(self._prompts))
        return int(np.random.default_rng([self._seed, epoch]).permutation(len(self._prompts))[place])
