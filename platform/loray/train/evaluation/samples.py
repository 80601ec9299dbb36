"""Short greedy answers to a few held-out prompts, by which a person sees what training has changed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AutoTokenizer

from loray.bases.registry import BaseModel
from loray.spec import Subject, printable
from loray.telemetry import get_logger
from loray.train.evaluation.documents import HeldOutPrompt
from loray.train.evaluation.perplexity import Measured

log = get_logger(__name__)

_MAX_ANSWER = 48  # tokens
_ANSWERS_S = 20.0  # after which all answers end where they are
_SHOWN = 400  # characters of a prompt's end


class Answers:
    """Collects the answers of the base and of the adapter to the same prompts. `tell` is told whose turn it is."""

    def __init__(self, base: BaseModel, prompts: Sequence[HeldOutPrompt], tell: Callable[[str], None]) -> None:
        self._prompts, self._tell = prompts, tell
        self._tokenizer: Any = AutoTokenizer.from_pretrained(base.path) if prompts else None
        self._answers: dict[Subject, list[str]] = {}

    def take(self, subject: Subject, load: Callable[[], Measured]) -> None:
        """Ask one of the two, which `load` returns whole; other subjects are passed over."""
        if not self._prompts or subject not in ("base", "adapter"):
            return
        self._tell(f"answering held-out prompts, {subject}")
        model = load().model
        try:
            answers = greedy_answers(model, [prompt.ids for prompt in self._prompts], self._tokenizer.eos_token_id)
        except RuntimeError as e:  # what is measured counts all the same
            log.warning("the %s answers no held-out prompt: %s", subject, e)
            return
        self._answers[subject] = [self._text(ids) for ids in answers]

    def samples(self) -> list[dict[str, str]]:
        """List for each prompt its end, the answer of the data, and those of both models; nothing where one of them
        has none.
        """
        if len(self._answers) < 2:
            return []
        found = []
        for i, prompt in enumerate(self._prompts):
            asked = self._text(prompt.ids)
            shown = asked if len(asked) <= _SHOWN else f"…{asked[-_SHOWN:]}"
            expected = self._text(prompt.answer_ids[:_MAX_ANSWER])
            answers = {str(subject): texts[i] for subject, texts in self._answers.items()}
            found.append({"prompt": shown, "expected": expected} | answers)
        return found

    def _text(self, ids: Sequence[int]) -> str:
        """Write tokens for people: without special tokens, and without what could change a terminal."""
        return printable(self._tokenizer.decode(ids, skip_special_tokens=True)).strip()


@torch.inference_mode()
def greedy_answers(
    model: Any, prompts: Sequence[Sequence[int]], end: int, clock: Callable[[], float] = time.monotonic
) -> list[list[int]]:
    """Answer prompts with the most likely tokens: each up to the token `end`, all together up to 48 tokens or twenty
    seconds.
    """
    began, cache = clock(), None
    answers: list[list[int]] = [[] for _ in prompts]
    left = set(range(len(prompts)))
    longest = max(map(len, prompts))
    gaps = [longest - len(prompt) for prompt in prompts]  # on the left
    padded = [[0] * gap + [*prompt] for gap, prompt in zip(gaps, prompts, strict=True)]
    inputs_BT = torch.tensor(padded, device=model.device)
    mask_BT = torch.tensor([[0] * gap + [1] * (longest - gap) for gap in gaps], device=model.device)
    positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
    for _ in range(_MAX_ANSWER):
        if not left or clock() - began >= _ANSWERS_S:
            break
        out = model(
            input_ids=inputs_BT,
            attention_mask=mask_BT,
            position_ids=positions_BT,
            cache=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        tokens_B = out.logits[:, -1].argmax(-1)
        for i, token in enumerate(tokens_B.tolist()):
            if token == end:
                left.discard(i)
            elif i in left:
                answers[i].append(token)
        cache, inputs_BT, positions_BT = out.cache, tokens_B[:, None], positions_BT[:, -1:] + 1
        mask_BT = torch.cat((mask_BT, torch.ones_like(inputs_BT)), 1)
    return answers
