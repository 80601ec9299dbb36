"""A served teacher: what it says is what its model computes; who cannot teach is refused with a reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from jobs.driver.prepare import prepare
from jobs.driver.teaching import KEY, ServedTeacher
from loray.bases.registry import add_base
from loray.errors import SpecError
from loray.settings import Settings
from loray.spec import Teaching
from loray.train.checkpoint import FolderReporter
from loray.train.loop import train
from tests.fixtures.cluster import Served
from tests.fixtures.recipes import write
from tests.fixtures.tiny import byte_tokenizer, write_checkpoint

K = 5


def test_a_run_learns_from_a_served_model_which_is_asked_once(
    served_alone: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_base(str(write_checkpoint(tmp_path / "checkpoint", std=0.05, seed=3)), home=tmp_path / "home", name="student")
    settings = Settings.from_env({"LORAY_HOME": str(tmp_path / "home")})
    objective = {"type": "distill", "teacher": served_alone.base.name, "url": f"{served_alone.url}/v1", "top_k": K}
    objective |= {"weight": 1}
    recipe = write(
        tmp_path, base="student", dtype="float32", objective=objective, optimizer={"learning_rate": 0.01}, max_steps=16
    )
    prepared = prepare(recipe, settings)
    asked = list[Any]()
    monkeypatch.setattr(ServedTeacher, "answers", lambda self, rows: asked.extend(rows) or iter(()))
    again = prepare(recipe, settings)
    assert (len(asked), prepared.data.lessons is None, again.data.lessons is None) == (0, False, False)

    theirs = AutoModelForCausalLM.from_pretrained(served_alone.base.path, dtype=torch.float32)
    assert prepared.data.lessons is not None
    (batch,) = prepared.data.stream(prepared.spec).next_step()
    batch = prepared.data.lessons[0].joined(batch)
    assert batch.teacher_ids_BTK is not None
    for b, (number,) in enumerate(batch.rows):
        ids, targets = prepared.data.train.row(number)
        with torch.no_grad():
            best = theirs(torch.from_numpy(ids[None].astype(np.int64))).logits[0, :-1].log_softmax(1).topk(K)
        assert targets[1:].all()
        assert batch.teacher_ids_BTK[b, : len(ids) - 1].equal(best.indices.int())
        torch.testing.assert_close(batch.teacher_log_probs_BTK[b, : len(ids) - 1], best.values, rtol=1e-3, atol=1e-3)

    reporter = FolderReporter(tmp_path / "run")
    train(prepared.spec, prepared.base, prepared.data, reporter=reporter, workdir=tmp_path)
    before, after = (e["divergence"] for e in reporter.events if e["event"] == "eval")
    assert after < before


Answer = Callable[[dict[str, Any]], httpx.Response]


def answering(answer: Answer) -> ServedTeacher:
    """A teacher whose server answers like this."""

    def handle(request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return httpx.Response(200, json={"id": "wise", "object": "model"})
        return answer(json.loads(request.content))

    teacher = ServedTeacher(Teaching("wise", "http://teacher:8000/v1", 30))
    teacher._http = httpx.Client(base_url=teacher.base_url, transport=httpx.MockTransport(handle))
    return teacher


def completion(ids: list[int] | None, num: int) -> httpx.Response:
    """A prompt's tokens, each with `num` others."""
    said = None
    if ids is not None:
        tokens = ({str(i): {"logprob": -1.0, "rank": 1}} for i in ids[1:])
        others = {str(1000 + n): {"logprob": -2.0 - n, "rank": 2 + n} for n in range(num)}
        said = [None, *(token | others for token in tokens)]
    return httpx.Response(200, json={"choices": [{"text": "", "prompt_logprobs": said}]})


def refused(message: str) -> httpx.Response:
    return httpx.Response(400, json={"error": {"message": message, "type": "invalid_request_error"}})


def ours(prompt: Any) -> list[int]:
    return prompt if isinstance(prompt, list) else byte_tokenizer()(prompt)["input_ids"]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda body: completion(None, 0), r"gives no prompt_logprobs; ask a server that does: loray's and vLLM's do"),
        (lambda body: refused("prompt_logprobs is unknown"), "cannot be asked: prompt_logprobs is unknown"),
        (lambda body: httpx.Response(200, json={"answer": 42}), "cannot be asked: its answer is not of this API"),
        (lambda body: completion(ours(body["prompt"])[::2], 0), "another tokenizer than this base: it makes"),
        (
            lambda body: refused("at most 20") if body["prompt_logprobs"] > 20 else completion(ours(body["prompt"]), 0),
            r"refuses objective\.top_k 30: at most 20; lower it",
        ),
        (
            lambda body: completion(ours(body["prompt"]), min(body["prompt_logprobs"], 10)),
            r"refuses objective\.top_k 30: the teacher gives 11 tokens a position; lower it",
        ),
    ],
    ids=["no logprobs", "unknown field", "no completion", "other tokens", "most", "fewer"],
)
def test_who_cannot_teach_is_refused(answer: Answer, message: str) -> None:
    with answering(answer) as teacher, pytest.raises(SpecError, match=message):
        teacher.check(byte_tokenizer())


def test_models_that_are_not_served_and_keys_that_lack_are_said(served_alone: Served) -> None:
    with (
        ServedTeacher(Teaching("nobody", f"{served_alone.url}/v1", K)) as teacher,
        pytest.raises(SpecError, match=r"teacher 'nobody' of .*/v1/models` lists what is served"),
    ):
        teacher.name()
    locked = httpx.MockTransport(
        lambda request: httpx.Response(401, json={"error": {"message": "no key", "type": "x"}})
    )
    with ServedTeacher(Teaching("wise", "http://teacher:8000/v1", K)) as teacher:
        teacher._http = httpx.Client(base_url=teacher.base_url, transport=locked)
        with pytest.raises(SpecError, match=f"no key; set {KEY} to a key of that server"):
            teacher.name()


def test_only_the_teachers_key_goes_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAY_API_KEY", "ours")
    for key, sent in ((None, "Bearer none"), ("theirs", "Bearer theirs")):
        if key is not None:
            monkeypatch.setenv(KEY, key)
        with ServedTeacher(Teaching("wise", "https://teacher/v1", K)) as teacher:
            assert teacher._http.headers["Authorization"] == sent


def test_a_base_with_other_tokens_does_not_teach(tmp_path: Path) -> None:
    home = tmp_path / "home"
    add_base(str(write_checkpoint(tmp_path / "checkpoint")), home=home, name="tiny")
    other = write_checkpoint(tmp_path / "other", seed=1)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["abc"])
    tokenizer.save_pretrained(other)
    add_base(str(other), home=home, name="other")
    settings = Settings.from_env({"LORAY_HOME": str(home)})
    recipe = write(tmp_path, dtype="float32", objective={"type": "distill", "teacher": "other"})
    with pytest.raises(SpecError, match=r"objective\.teacher other has another tokenizer than tiny"):
        prepare(recipe, settings)
