"""A folder that PEFT saved, published on a running server and asked at once.

loray up
python examples/bring_a_peft_adapter.py FOLDER tone smollm2
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from loray.client import CatalogClient, LorayClient

FOLDER, NAME, BASE = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
URL = os.environ.get("LORAY_URL", "http://127.0.0.1:8000")

with CatalogClient(URL) as catalog, LorayClient(URL) as models:
    upload = catalog.begin_upload(idempotency_key=f"{NAME} {time.time_ns()}")  # the same key continues an upload
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        catalog.put_file(upload.id, FOLDER / name)
    # Checked as a whole: format, shapes against the base, values, hashes. Then it is a version.
    made = catalog.register(NAME, upload=upload.id, base=BASE, description="from PEFT")
    print(f"published {NAME}@{made.version}: {made.manifest.method}, digest {made.digest[:12]}")
    answer = models.complete(f"{NAME}@{made.version}", "Hello", max_tokens=8)
    print("answer:", answer.choices[0].text)
