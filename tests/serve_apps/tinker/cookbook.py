"""A working directory in which the cookbook's loops find their model and data sets as folders, without a network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from loray.bases.registry import BaseModel

MODEL = "Qwen/Qwen3-8B-Base"  # whose renderer needs no chat template
QUESTION = "How many r's are in strawberry?"  # of the prompt's own example: some of eight answers copy it
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "config.json")
_ROWS = 60
_THINGS = ("apple", "river", "lamp", "stone", "cloud", "table")


def write_working_directory(folder: Path, base: BaseModel) -> None:
    model = folder / MODEL
    model.mkdir(parents=True)
    for name in _TOKENIZER:
        shutil.copy(base.path / name, model / name)
    robots = folder / "HuggingFaceH4" / "no_robots"
    robots.mkdir(parents=True)
    with (robots / "train.jsonl").open("w") as f:
        for i in range(_ROWS):
            thing = _THINGS[i % len(_THINGS)]
            asked, said = f"Name a {thing}, number {i}.", f"The {thing} has the name number {i}."
            messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
            f.write(json.dumps({"messages": messages}) + "\n")
    gsm8k = folder / "openai" / "gsm8k"
    gsm8k.mkdir(parents=True)
    split = "configs:\n- config_name: main\n  data_files:\n  - split: train\n    path: train.jsonl\n"
    (gsm8k / "README.md").write_text(f"---\n{split}---\n")
    row = json.dumps({"question": QUESTION, "answer": "There are three.\n#### 3"})
    (gsm8k / "train.jsonl").write_text(f"{row}\n" * _ROWS)
