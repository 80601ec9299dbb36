"""The snapshot on disk: what is written is read, and what is damaged, old or another's is not used."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from loray.catalog import Catalog, CatalogSnapshot
from loray.catalog import snapshot_file as frame
from loray.catalog.snapshot_file import SnapshotFile
from loray.files import touch
from loray.spec import AdapterManifest
from loray.spec.adapters import text_sha256
from tests.fixtures.versions import digest, manifest, publish

URL = "postgresql://loray:secret@db/loray"


@pytest.fixture
def snapshot(tmp_path: Path) -> CatalogSnapshot:
    catalog = Catalog(f"sqlite:///{tmp_path}/catalog.db")
    publish(catalog, "tone", 1, 2, aliases=("prod", "canary"))
    for i in range(5):
        publish(catalog, f"x{i}", i)
    files = {AdapterManifest.TEMPLATE_FILE: text_sha256("{{ messages }}")}
    own = manifest(9).model_copy(update={"chat_template": "{{ messages }}", "files": files})
    catalog.adapters.register("chat", digest(9), own)
    invoked = manifest(10).model_copy(update={"method": "alora", "invocation_tokens": (257, 97)})
    catalog.adapters.register("invoked", digest(10), invoked)
    found = catalog.snapshot()
    catalog.close()
    return found


@pytest.fixture
def kept(tmp_path: Path, snapshot: CatalogSnapshot, monkeypatch: pytest.MonkeyPatch) -> SnapshotFile:
    monkeypatch.setattr(frame, "_BLOCK", 3)
    file = SnapshotFile(tmp_path / "home" / "snapshot.jsonl", URL)
    assert file.write(snapshot)
    return file


def test_what_is_written_is_read(kept: SnapshotFile, snapshot: CatalogSnapshot) -> None:
    found = kept.read()
    assert found is not None
    assert found.state == snapshot
    assert found.state.resolve("tone").version == 2
    assert found.age_s < 60
    assert stat.S_IMODE(kept.path.stat().st_mode) == 0o600
    assert [p.name for p in kept.path.parent.iterdir()] == ["snapshot.jsonl"]
    assert b"secret" not in kept.path.read_bytes()
    assert SnapshotFile(kept.path, URL.replace("secret", "new")).read() == (snapshot, pytest.approx(0, abs=60))


def test_it_stays_current_until_it_is_old(kept: SnapshotFile, caplog: pytest.LogCaptureFixture) -> None:
    os.utime(kept.path, (0, time.time() - 8 * 24 * 3600))
    assert kept.read() is None
    assert "192 h old" in caplog.text
    assert touch(kept.path)
    assert kept.read() is not None
    assert not touch(kept.path.with_name("other"))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: data[: data.rindex(b"\n", 0, -1) + 1], "its end is missing"),
        (lambda data: data.replace(b'"tone"', b'"tune"'), "its bytes differ"),
        (lambda data: data[:-30], "damaged"),
        (lambda data: data + b"{}\n", "its bytes differ"),
        (lambda data: b"", "damaged"),
        (lambda data: b"[]\n", "damaged"),
        (lambda data: b"\xff\xfe", "damaged"),
        (lambda data: data.replace(b'"format":4', b'"format":0'), "format 0"),
    ],
)
def test_what_is_wrong_is_not_used(
    kept: SnapshotFile, damage: Callable[[bytes], bytes], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    kept.path.write_bytes(damage(kept.path.read_bytes()))
    assert kept.read() is None
    assert reason in caplog.text
    assert len(caplog.records) == 1


def test_what_others_may_write_is_not_used(kept: SnapshotFile, caplog: pytest.LogCaptureFixture) -> None:
    kept.path.chmod(0o644)
    assert kept.read() is None
    assert "others may" in caplog.text


def test_another_catalogs_is_not_used(kept: SnapshotFile, caplog: pytest.LogCaptureFixture) -> None:
    assert SnapshotFile(kept.path, "postgresql://loray@db/other").read() is None
    assert "of another catalog" in caplog.text


def test_a_folder_that_cannot_be_written_is_a_warning(
    snapshot: CatalogSnapshot, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    assert not SnapshotFile(tmp_path / "file" / "snapshot", URL).write(snapshot)
    assert "cannot be kept" in caplog.text
    assert SnapshotFile(tmp_path / "nothing", URL).read() is None
