"""The last layer for the tokens whose logits are needed, against all of it: the same bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, VeraConfig
from torch import Tensor

from loray.bases.registry import BaseModel
from loray.engine.model import decoder
from loray.engine.model.batch import Batch, logits_part
from loray.engine.model.decoder import Decoder
from loray.engine.pool.pool import Pool
from loray.spec import LINEAR_MODULES
from tests.engine.adapters import LINEAR_ROPE, NORMS, TestAdapter, make_adapters
from tests.engine.harness import make_engine, request, run

ALL = list(LINEAR_MODULES)


def adapters(base: BaseModel, folder: Path) -> list[TestAdapter]:
    return make_adapters(
        base,
        folder,
        [
            (LoraConfig(r=16, target_modules=ALL), None),
            (LoraConfig(r=4, target_modules=ALL, use_dora=True), None),
            (LoraConfig(r=4, target_modules=ALL[:4], modules_to_save=NORMS), LINEAR_ROPE),
            (VeraConfig(r=20, target_modules=ALL, save_projection=False), None),
        ],
    )


class Parts:
    """The parts that were computed; each step's logits are compared with those of the whole batch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[Batch, Batch]] = []
        self._whole = False
        forward = Decoder._forward
        monkeypatch.setattr(decoder, "logits_part", self._part)

        def both(model: Decoder, batch: Batch, pool: Pool, on_scored: Callable[[Tensor], None]) -> Tensor:
            self._whole = True
            expected_RV = forward(model, batch, pool, lambda logits_RV: None).clone()
            self._whole = False
            got_RV = forward(model, batch, pool, on_scored)
            assert torch.equal(got_RV, expected_RV)
            return got_RV

        monkeypatch.setattr(Decoder, "_forward", both)

    def _part(self, batch: Batch) -> Batch | None:
        part = None if self._whole else logits_part(batch)
        if part is not None:
            self.seen.append((batch, part))
        return part


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_of_prompts(any_base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    own = adapters(any_base, tmp_path)
    engine = make_engine(any_base, own, dtype=dtype, max_num_batched_tokens=24, max_num_seqs=12)
    parts = Parts(monkeypatch)
    models = [None, *own, own[0], None]
    run(engine, [request(str(i), range(3, 12 + 4 * i), a, max_tokens=3) for i, a in enumerate(models)])
    run(engine, [request("long", range(100, 160), own[0], max_tokens=1)])
    engine.close()
    kept = [part.token_ids_T.shape[0] for _, part in parts.seen]
    assert max(kept) > 1
    assert {len(part.adapters.spans) for _, part in parts.seen} >= {0, 1}
    # In the middle of a prompt no logits are needed.
    assert any(not part.last for _, part in parts.seen)


def test_all_tokens_are_kept_where_most_have_logits_or_a_prompt_is_scored(
    tiny_base: Callable[..., BaseModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(tiny_base(), max_num_batched_tokens=64)
    parts = Parts(monkeypatch)
    run(engine, [request("scored", range(20), max_tokens=1, prompt_logprobs=0)])
    run(engine, [request("short", range(1, 2), max_tokens=5)])
    assert not parts.seen
    run(engine, [request("whole", range(30, 50), max_tokens=1)])
    engine.close()
    [(batch, part)] = parts.seen
    assert batch.last == (19,)
    assert part.positions_T.tolist() == [19]
