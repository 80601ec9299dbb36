"""OpenAI's client unmodified, from an uploaded file to a model that answers: on the session's cluster with a tiny base,
and on a `loray up` of its own with SmolLM2.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.fixtures.asking import eventually
from tests.fixtures.cluster import Served, free_port

ROW = {
    "messages": [
        {"role": "system", "content": "You answer with the next letters."},
        {"role": "user", "content": "abc"},
        {"role": "assistant", "content": "no", "weight": 0},
        {"role": "user", "content": "abc"},
        {"role": "assistant", "content": "defghi", "weight": 1},
    ]
}
PAIR = {
    "input": {"messages": ROW["messages"][:2], "tools": []},
    "preferred_output": [{"role": "assistant", "content": "defghi"}],
    "non_preferred_output": [{"role": "assistant", "content": "xyz"}],
}
# A tiny base has a token for each byte.
QUICK = {"loray.recipe": json.dumps({"dtype": "float32", "data": {"max_length": 512}, "tracking": []})}


def lines(record: dict[str, Any], count: int) -> bytes:
    return (json.dumps(record) + "\n").encode() * count


@contextmanager
def client_of(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=90) as client:
        yield client


def ended(client: openai.OpenAI, job_id: str) -> Any:
    """The job once it has ended."""
    assert eventually(
        lambda: client.fine_tuning.jobs.retrieve(job_id).status in ("succeeded", "failed", "cancelled"), 240, 0.5
    ), client.fine_tuning.jobs.retrieve(job_id)
    return client.fine_tuning.jobs.retrieve(job_id)


def train_and_ask(client: openai.OpenAI, base: str, *, suffix: str, num_rows: int, metadata: dict[str, str]) -> Any:
    """Go the whole way, and return the job."""
    file = client.files.create(file=("rows.jsonl", lines(ROW, num_rows)), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model=base,
        training_file=file.id,
        suffix=suffix,
        seed=1,
        metadata=metadata,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 4}}},
    )
    client.files.delete(file.id)  # what the job still needs stays until it has ended
    job = ended(client, job.id)
    assert (job.status, job.error) == ("succeeded", None), job
    events = list(client.fine_tuning.jobs.list_events(job.id))
    losses = [event.data["train_loss"] for event in events[::-1] if "train_loss" in (event.data or {})]
    assert len(losses) == 2 * -(-(num_rows - max(1, num_rows // 20)) // 4)
    assert losses[-1] < losses[0]
    assert job.trained_tokens > 0
    assert job.fine_tuned_model == f"{suffix}@1"
    check_answers(client, job)
    return job


def check_answers(client: openai.OpenAI, job: Any) -> None:
    """The job's only checkpoint is its model, which answers."""
    (checkpoint,) = client.fine_tuning.jobs.checkpoints.list(job.id)
    assert checkpoint.fine_tuned_model_checkpoint == job.fine_tuned_model

    def answers() -> bool:
        try:
            asked: Any = ROW["messages"][:2]
            answer = client.chat.completions.create(model=job.fine_tuned_model, messages=asked, max_tokens=4)
        except openai.NotFoundError:  # the gateway reads within a second what was published
            return False
        return bool(answer.choices[0].message.content is not None)

    assert eventually(answers)


@pytest.mark.cluster
def test_from_a_file_to_a_model_on_the_cluster(served: Served) -> None:
    with client_of(served.url) as client:
        train_and_ask(client, served.base.name, suffix="letters", num_rows=20, metadata=QUICK)
        wrong = lines(ROW, 2) + b'{"messages": [{"role": "user", "content": "alone"}]}\n'
        file = client.files.create(file=("wrong.jsonl", wrong), purpose="fine-tune")
        failed = ended(client, client.fine_tuning.jobs.create(model=served.base.name, training_file=file.id).id)
        assert (failed.status, failed.error.param) == ("failed", "training_file")
        assert "line 3" in failed.error.message


@pytest.mark.slow
@pytest.mark.cluster
def test_a_model_learns_from_pairs_and_a_job_is_cancelled(served: Served) -> None:
    with client_of(served.url) as client:
        first = train_and_ask(client, served.base.name, suffix="further", num_rows=20, metadata=QUICK)
        file = client.files.create(file=("pairs.jsonl", lines(PAIR, 8)), purpose="fine-tune")
        further = client.fine_tuning.jobs.create(
            model=first.fine_tuned_model,
            training_file=file.id,
            suffix="further",
            metadata=QUICK,
            method={"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2, "n_epochs": 1}}},
        )
        further = ended(client, further.id)
        assert (further.status, further.fine_tuned_model) == ("succeeded", "further@2"), further
        assert served.catalog.adapters.version("further", 2).manifest.parent is not None

        file = client.files.create(file=("rows.jsonl", lines(ROW, 20)), purpose="fine-tune")
        long = client.fine_tuning.jobs.create(
            model=served.base.name, training_file=file.id, hyperparameters={"n_epochs": 50}, metadata=QUICK
        )
        assert eventually(lambda: client.fine_tuning.jobs.retrieve(long.id).status == "running", 60)
        client.fine_tuning.jobs.cancel(long.id)
        assert ended(client, long.id).status == "cancelled"


@pytest.mark.slow
@pytest.mark.cluster
def test_a_model_learns_from_a_grader(served: Served) -> None:
    grader = {"type": "text_similarity", "name": "alike", "evaluation_metric": "fuzzy_match"}
    grader |= {"input": "{{sample.output_text}}", "reference": "{{item.answer}}"}
    hyper = {"n_epochs": 1, "batch_size": 2, "compute_multiplier": 0.5, "eval_interval": 2}
    further = json.loads(QUICK["loray.recipe"]) | {"objective": {"max_tokens": 8}, "max_steps": 3, "num_epochs": None}
    with client_of(served.url) as client:
        row = {"messages": ROW["messages"][:2], "answer": "aeiou aeiou"}
        file = client.files.create(file=("rows.jsonl", lines(row, 12)), purpose="fine-tune")
        job = client.fine_tuning.jobs.create(
            model=served.base.name,
            training_file=file.id,
            suffix="graded",
            seed=1,
            metadata={"loray.recipe": json.dumps(further)},
            method={"type": "reinforcement", "reinforcement": {"grader": grader, "hyperparameters": hyper}},
        )
        job = ended(client, job.id)
        assert (job.status, job.error, job.fine_tuned_model) == ("succeeded", None, "graded@1"), job
        assert job.method.reinforcement.grader.to_dict() == grader
        events = [event.data for event in client.fine_tuning.jobs.list_events(job.id)][::-1]
        rewards = [data["train_reward_mean"] for data in events if "train_reward_mean" in data]
        assert len(rewards) == 3
        assert 0 < rewards[0] < 1
        assert [data["step"] for data in events if "valid_reward_mean" in data] == [0, 2, 3]
        assert job.trained_tokens > 0
        check_answers(client, job)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_from_a_file_to_a_model_with_smollm2(tmp_path: Path) -> None:
    port = free_port()
    ours = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env = ours | {"LORAY_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "loray.cli.main"]
    subprocess.run([*command, "base", "add", "smollm2"], env=env, check=True, timeout=300)
    try:
        subprocess.run([*command, "up", "--port", str(port)], env=env, check=True, timeout=300)
        with client_of(f"http://127.0.0.1:{port}") as client:
            began_at = time.monotonic()
            train_and_ask(client, "smollm2", suffix="letters", num_rows=20, metadata={})
            print(f"{time.monotonic() - began_at:.0f} s from the file to the answer")
    finally:
        subprocess.run([*command, "down"], env=env, check=True, timeout=180)
