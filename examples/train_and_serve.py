"""From a file of rows to an answer, through the API of a server with a Ray cluster: `loray up`.

loray up
python examples/train_and_serve.py my.jsonl tone
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from loray.client import CatalogClient, LorayClient
from loray.errors import TrainingError

DATA, NAME = Path(sys.argv[1]).resolve(), sys.argv[2]  # a file on the server's disk; s3:// works from everywhere
URL = os.environ.get("LORAY_URL", "http://127.0.0.1:8000")

with CatalogClient(URL) as catalog, LorayClient(URL) as models:
    # What the recipe leaves out has the default of its method: `loray recipes show` has all, with reasons.
    job = catalog.submit(
        {
            "name": NAME,
            "base": os.environ.get("MODEL", "smollm2"),
            "data": {"train": str(DATA)},
            "num_epochs": 10,
        }
    )
    print("job", job.id)
    for line in catalog.follow(job.id):  # until it ends
        event = json.loads(line) if line.startswith('{"event"') else {}
        if event.get("event") == "step":
            print(f"step {event['step']}: loss {event['loss']:.3f}")
    ended = catalog.job(job.id)
    if ended.status != "succeeded":
        raise TrainingError(f"job {job.id} {ended.status}: {ended.message}")
    catalog.promote(NAME, "prod", ended.version or 1)
    answer = models.chat(f"{NAME}@{ended.version}", [{"role": "user", "content": "Hello!"}], max_tokens=16)
    print(f"{NAME}@{ended.version} says: {answer.choices[0].message.content}")
