"""A new version goes live, and back: by moving an alias, while requests go on. Nothing is deployed again.

loray up                                                # with an adapter of two versions, see docs/tutorial.md
python examples/promote_and_roll_back.py tone
"""

from __future__ import annotations

import os
import sys
import time

from loray.client import CatalogClient, LorayClient
from loray.errors import RevisionConflict

NAME = sys.argv[1] if len(sys.argv) > 1 else "tone"
URL = os.environ.get("LORAY_URL", "http://127.0.0.1:8000")

with CatalogClient(URL) as catalog, LorayClient(URL) as models:

    def served() -> str:
        """What a request for NAME@prod gets: gateways look for changes every half second."""
        time.sleep(1)
        return models.model(f"{NAME}@prod").root

    newest, before, *_ = [version.version for version in catalog.versions(NAME)]
    prod = catalog.promote(NAME, "prod", before)
    print("prod is", served())
    prod = catalog.promote(NAME, "prod", newest, etag=prod.etag)  # only if nobody has moved it meanwhile
    print("prod is", served())
    try:
        catalog.promote(NAME, "prod", before, etag='"0"')
    except RevisionConflict as e:
        print("refused:", e)
    catalog.rollback(NAME, etag=prod.etag)
    print("prod is", served(), "again")
