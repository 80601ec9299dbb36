"""The tasks, read from a folder of their files, and their scores: E2E (BLEU), GSM8K and AG News (exact match)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from loray.errors import DataError

_ANSWER = re.compile(r"#### *(-?[\d,]*\.?\d+)")  # GSM8K ends a solution with #### and the number


class Pair(NamedTuple):
    prompt: str
    completion: str


class Question(NamedTuple):
    """An answer is right if it equals any of `references`."""

    prompt: str
    references: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Task:
    """`score(answers, questions)` is between 0 and 100; answers are in the order of the questions."""

    name: str
    metric: str
    max_tokens: int  # of an answer
    pairs: Callable[[Path], list[Pair]]
    questions: Callable[[Path], list[Question]]
    score: Callable[[Sequence[str], Sequence[Question]], float]


def bleu(answers: Sequence[str], questions: Sequence[Question]) -> float:
    """sacrebleu's corpus BLEU of the answers' first lines against all references."""
    from sacrebleu.metrics import BLEU

    most = max(len(q.references) for q in questions)
    streams = [[q.references[i] if i < len(q.references) else None for q in questions] for i in range(most)]
    return float(BLEU().corpus_score([_line(a) for a in answers], streams).score)


def exact_match(answers: Sequence[str], questions: Sequence[Question]) -> float:
    """Per cent of answers whose first line is a reference, ignoring case."""
    return _share(_line(a).lower() in {r.strip().lower() for r in q.references} for a, q in _zip(answers, questions))


def last_number(answers: Sequence[str], questions: Sequence[Question]) -> float:
    """GSM8K's exact match: per cent of answers whose number after #### is that of a reference."""
    return _share(
        number(a) is not None and number(a) in {number(r) for r in q.references} for a, q in _zip(answers, questions)
    )


def number(text: str) -> float | None:
    """The number after the first ####, or None."""
    found = _ANSWER.search(text)
    return None if found is None else float(found[1].replace(",", ""))


def _zip(answers: Sequence[str], questions: Sequence[Question]) -> list[tuple[str, Question]]:
    return list(zip(answers, questions, strict=True))


def _share(right: Iterable[bool]) -> float:
    counted = list(right)
    return 100 * sum(counted) / len(counted)


def _line(answer: str) -> str:
    """The first line alone: a base that was not trained to stop continues with more examples."""
    return answer.strip().partition("\n")[0].strip()


def _jsonl(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    except OSError as e:
        raise DataError(f"{path} cannot be read: {e.strerror or e}; name the folder that holds it") from e


def _e2e_pairs(data: Path) -> list[Pair]:
    return [Pair(r["prompt"], r["completion"]) for r in _jsonl(data / "e2e_train.jsonl")]


def _e2e_questions(data: Path) -> list[Question]:
    return [Question(r["prompt"], tuple(r["references"])) for r in _jsonl(data / "e2e_validation.jsonl")]


def _gsm8k_pairs(data: Path) -> list[Pair]:
    return [Pair(r["prompt"], r["completion"]) for r in _jsonl(data / "gsm8k_train.jsonl")]


def _gsm8k_questions(data: Path) -> list[Question]:
    return [Question(r["prompt"], (r["completion"],)) for r in _jsonl(data / "gsm8k_validation.jsonl")]


_NEWS = ("ag_news_classify", "ag_news_which_section")  # prefixes of all templates that ask for the topic


def _news(data: Path, split: str) -> list[Pair]:
    path = data / "t0_many_tasks.parquet"
    try:
        rows = pq.read_table(path, columns=["task", "split", "prompt", "completion"]).to_pylist()
    except OSError as e:
        raise DataError(f"{path} cannot be read: {e}; name the folder that holds it") from e
    return [Pair(r["prompt"], r["completion"]) for r in rows if r["task"].startswith(_NEWS) and r["split"] == split]


def _news_pairs(data: Path) -> list[Pair]:
    return _news(data, "train")


def _news_questions(data: Path) -> list[Question]:
    """Validation pairs, except articles that the training pairs contain under another template."""
    trained = "\n".join(pair.prompt for pair in _news_pairs(data))
    pairs = [pair for pair in _news(data, "validation") if not _has_article(trained, pair.prompt)]
    return [Question(pair.prompt, (pair.completion,)) for pair in pairs]


def _has_article(trained: str, prompt: str) -> bool:
    """Every template has the article word for word, and the prompt's longest line belongs to the article."""
    return max(prompt.split("\n"), key=len).strip() in trained


TASKS = {
    task.name: task
    for task in (
        Task("e2e", "BLEU", 64, _e2e_pairs, _e2e_questions, bleu),
        Task("gsm8k", "exact match", 160, _gsm8k_pairs, _gsm8k_questions, last_number),
        Task("ag_news", "exact match", 8, _news_pairs, _news_questions, exact_match),
    )
}
