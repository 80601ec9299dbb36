"""Another process that changes the catalog: `python -m benchmarks.catalog.writer URL NAME COUNT PAUSE_S`.

It moves alias `prod` of an adapter with three versions, the first of which has it, and prints version and time of each
move when it is committed. After each it waits for a line of its input: a gateway that looks now and then would miss
one of two moves in quick succession.
"""

from __future__ import annotations

import sys
import time

from loray.catalog import Catalog


def main(url: str, name: str, count: int, pause_s: float) -> None:
    catalog = Catalog(url)
    for i in range(count):
        time.sleep(pause_s)
        version = (i + 1) % 3 + 1
        catalog.promote(name, "prod", version)
        sys.stdout.write(f"{version} {time.monotonic()}\n")
        sys.stdout.flush()
        sys.stdin.readline()
    catalog.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
