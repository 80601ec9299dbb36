"""A tiny base with the tokens of the real one."""

from __future__ import annotations

import shutil

import pytest

from loray.bases.registry import BaseModel, add_base
from tests.fixtures.tiny import write_checkpoint


@pytest.fixture(scope="session")
def worded(smollm2: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """A random model with SmolLM2's tokenizer; the model has some tokens more, as padded embeddings do."""
    vocab = smollm2.config.vocab_size + 40
    folder = write_checkpoint(
        tmp_path_factory.mktemp("worded"), vocab_size=vocab, num_hidden_layers=1, eos_token_id=2, bos_token_id=1
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(smollm2.path / name, folder / name)
    return add_base(str(folder), home=tmp_path_factory.mktemp("home"), name="worded")
