"""Where a text stood before, how likely what followed is, and how many guesses a step is given."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence

import pytest

from loray.engine.request import Chunk, Request, StepWork
from loray.engine.scheduling.speculation import MAX_GUESSES, MAX_MATCH, NgramIndex, Speculation, new_rates
from loray.spec import AdapterRef, GenerateRequest, SamplingParams
from tests.fixtures.guesses import FixedCosts
from tests.fixtures.scheduling import adapter


def made(
    prompt: Sequence[int],
    output: Sequence[int] = (),
    number: int = 0,
    name: str = "r",
    adapter_ref: AdapterRef | None = None,
    tenant: str = "",
    cache_salt: str = "",
    **params: object,
) -> Request:
    own = SamplingParams(max_tokens=1000).model_copy(update=params)
    spec = GenerateRequest(name, tuple(prompt), own, adapter_ref, tenant=tenant, cache_salt=cache_salt)
    request = Request(spec, number, output_ids=list(output))
    request.num_computed = request.num_tokens - 1
    return request


def chunk_of(request: Request) -> Chunk:
    return Chunk(request, request.num_computed, request.num_pending)


def texts(rng: random.Random) -> Iterator[list[int]]:
    """Random ones, some of which repeat parts of themselves."""
    for alphabet, num in itertools.product((12, 40), (2, 60, 150)):
        text = [rng.randrange(alphabet) for _ in range(num)]
        for _ in range(rng.randrange(4)):
            start = rng.randrange(num)
            text += text[start : start + rng.randint(1, 30)]
            text += [rng.randrange(alphabet) for _ in range(rng.randint(0, 3))]
        yield text


def longest(text: Sequence[int]) -> int:
    """The longest end of the text, of two tokens at least, that stands in it before; 0: there is none."""
    found = (n for n in range(2, len(text)) for i in range(n, len(text)) if text[i - n : i] == text[-n:])
    return max(found, default=0)


def test_the_longest_match_is_found_token_by_token() -> None:
    rng = random.Random(0)
    num_found = 0
    for text in texts(rng):
        num_prompt = rng.randint(1, len(text) - 1)
        request = made(text[:num_prompt])
        index = NgramIndex(new_rates())
        for n in range(num_prompt, len(text) + 1):
            request.output_ids[:] = text[num_prompt:n]
            assert index.read(request)
            assert min(index.length, MAX_MATCH) == min(longest(text[:n]), MAX_MATCH)
            if index.length:
                num_found += 1
                (guess,) = index.guesses(1)
                last = text[:n][-min(index.length, MAX_MATCH) :]
                assert any(text[i - len(last) : i] == last and text[i] == guess for i in range(len(last), n))
    assert num_found > 100


def test_of_equal_matches_the_last_one_counts() -> None:
    index = NgramIndex(new_rates())
    index.read(made([1, 2, 3, 0, 1, 2, 4, 0, 0, 1, 2]))
    assert index.guesses(3) == [4, 0, 0]


def test_a_text_that_repeats_itself_goes_on() -> None:
    index = NgramIndex(new_rates())
    index.read(made([9, 1, 2, 3, 1, 2, 3, 1, 2]))
    assert index.guesses(7) == [3, 1, 2, 3, 1, 2, 3]


def test_a_long_prompt_is_taken_in_parts() -> None:
    text = [*range(5000), *range(70)]
    index, request = NgramIndex(new_rates()), made(text)
    assert not index.read(request)
    assert index.read(request)
    assert (index.length, index.guesses(2)) == (MAX_MATCH, [70, 71])


def test_chances_follow_what_came() -> None:
    """Nothing was guessed meanwhile: what would have been is compared with what came."""
    rng = random.Random(1)
    prompt = [rng.randrange(1000) for _ in range(200)]
    copying, free = made(prompt), made(prompt)
    indexes = [NgramIndex(new_rates()) for _ in range(2)]
    for i in range(62):  # the free text has pairs of the prompt, each with another token after it
        place = rng.randrange(190)
        copying.output_ids.append(prompt[i])
        free.output_ids.append([prompt[60], prompt[61], 1000 + place][i % 3])
        for index, request in zip(indexes, (copying, free), strict=True):
            assert index.read(request)
    chances = indexes[0].chances(0.2, MAX_GUESSES)
    assert len(chances) == MAX_GUESSES
    assert chances == sorted(chances, reverse=True)
    assert chances[0] > 0.9
    assert len(indexes[1].chances(0.2, MAX_GUESSES)) < 3


def test_a_new_request_is_expected_to_be_like_the_others() -> None:
    of_all, free = new_rates(), list(range(100, 200))
    for _ in range(20):
        index, request = NgramIndex(of_all), made([*range(40)])
        for token in (*range(12), *free[:3]):
            request.output_ids.append(token)
            index.read(request)
    assert of_all[MAX_MATCH] > 0.6
    assert NgramIndex(of_all).rates == of_all
    assert of_all[2] > 0.5
    other, request = NgramIndex(of_all), made([*range(40)])
    for i in range(6):
        request.output_ids += [4 * i, 4 * i + 1, free[i]]
        other.read(request)
    assert other.rates[2] < 0.4 < of_all[2]


class Chances(Speculation):
    """Of given chances, by request."""

    def __init__(self, costs: StepWork, chances: Sequence[Sequence[float]]) -> None:
        super().__init__(FixedCosts(costs))
        self._given = chances

    def _chances(self, chunk: Chunk, least: float) -> Sequence[float]:
        request = chunk.request
        request.ngrams = index = NgramIndex(new_rates())
        index.read(request)
        return [c for c in self._given[request.arrival] if c > least]


@pytest.mark.parametrize("row_s", [0.0, 0.01, 0.05, 0.1, 0.3, 1.0])
def test_the_expected_tokens_of_a_second_are_most(row_s: float) -> None:
    """By trying all numbers of guesses. A guessed row counts a quarter more than it takes."""
    rng = random.Random(round(1000 * row_s))
    for _ in range(20):
        rates = [rng.uniform(0.3, 1) for _ in range(3)]
        chances = [[rate**n for n in range(1, 5) if rate**n > 0.2] for rate in rates]
        costs = StepWork(num_steps=1.0, num_decoded=row_s)
        speculation, chunks = Chances(costs, chances), [chunk_of(made([1, 2, 1, 2], number=i)) for i in range(3)]
        work = StepWork(num_steps=1, num_decoded=3)
        found = {i: len(guesses) for i, guesses in speculation.guesses(chunks, work, 100)}

        def rate(nums: Sequence[int], chances: list[list[float]] = chances) -> float:
            gained = sum(sum(own[:n]) for own, n in zip(chances, nums, strict=True))
            return (3 + gained) / (1 + 3 * row_s + 1.25 * row_s * sum(nums))

        best = max(map(rate, itertools.product(*(range(len(own) + 1) for own in chances))))
        assert rate([found.get(i, 0) for i in range(3)]) == pytest.approx(best)


def test_a_step_that_is_bound_by_operations_guesses_nothing() -> None:
    chunks = [chunk_of(made([1, 2, 3, 1, 2], number=i)) for i in range(20)]
    speculation = Chances(StepWork(num_steps=0.001, num_decoded=0.01), [[0.9, 0.8]] * 20)
    assert [*speculation.guesses(chunks[:1], StepWork(1, 1), 99)] == []
    speculation = Chances(StepWork(num_steps=0.1, num_decoded=0.001), [[1.0, 1.0]] * 20)
    assert [*speculation.guesses(chunks[:1], StepWork(1, 1), 99)] == [(0, [3, 1])]
    assert sum(len(g) for _, g in speculation.guesses(chunks, StepWork(1, 20), 7)) == 7


def test_before_a_step_has_been_measured_nothing_is_guessed() -> None:
    assert [*Speculation(FixedCosts(StepWork())).guesses([chunk_of(made([1, 2, 1, 2]))], StepWork(1, 1), 99)] == []


def test_an_answer_is_guessed_from_the_latest_ones_of_its_owner() -> None:
    """Of the same tenant, adapter and cache salt; what was learned of these guesses tells what is like them."""
    answer = [11, 12, 13, 14, 15, 16, 17]
    speculation = Speculation(FixedCosts(StepWork(num_steps=1.0, num_decoded=0.01)))

    def guessed(name: str, digest: str, **own: str) -> list[int]:
        request = made([90, 91, 92, 93], answer[:3], adapter_ref=adapter(digest), name=name, **own)
        found = [*speculation.guesses([chunk_of(request)], StepWork(1, 1), 99)]
        if not found:
            return []
        ((place, guesses),) = found
        assert place == 0
        return [*guesses]

    assert not guessed("first", "a")
    done = made([90, 91, 92, 93], adapter_ref=adapter("a"), name="done")
    speculation.ended(done)  # it has guessed nothing yet: nothing is kept
    assert not guessed("second", "a")
    assert not [*speculation.guesses([chunk_of(done)], StepWork(1, 1), 99)]
    done.output_ids += answer
    speculation.ended(done)
    assert guessed("third", "a") == answer[3:4]  # as many as are likely with what little is known
    assert not guessed("other adapter", "b")
    assert not guessed("other tenant", "a", tenant="t")
    assert not guessed("other salt", "a", cache_salt="s")


def test_of_many_owners_the_latest_are_kept() -> None:
    speculation = Speculation(FixedCosts(StepWork(num_steps=1.0, num_decoded=0.01)))
    for i in range(1000):
        request = made([1, 2, 3], [4, 5], tenant=str(i))
        [*speculation.guesses([chunk_of(request)], StepWork(1, 1), 99)]
        request.output_ids += range(700)
        speculation.ended(request)
    assert {len(tokens) for tokens in speculation._answers.values()} == {512}
    assert [tenant for tenant, *_ in speculation._answers] == [str(i) for i in range(744, 1000)]


@pytest.mark.parametrize(
    ("params", "most"),
    [
        ({}, MAX_GUESSES),
        ({"max_tokens": 4}, 3),
        ({"max_tokens": 1}, 0),
        ({"repetition_penalty": 1.1}, 0),
        ({"bad_words": ((1, 2),)}, 0),
        ({"temperature": 1.0, "top_k": 7, "logprobs": 3}, MAX_GUESSES),
    ],
)
def test_how_many_a_request_may_guess(params: dict[str, object], most: int) -> None:
    request = made([1, 2, 3, 1, 2], **params)
    assert Speculation(FixedCosts(StepWork())).most(chunk_of(request)) == most
    request.num_in_flight = 1
    assert Speculation(FixedCosts(StepWork())).most(chunk_of(request)) == 0
