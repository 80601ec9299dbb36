"""Pages of files and batches: sent, listed by purpose, taken back, deleted; and training from an uploaded file."""

from __future__ import annotations

import pytest

from loray.errors import UserFileNotFound
from tests.serve_apps.console.site import ConsoleSite

ROW = b'{"messages": []}\n'


def sent(console: ConsoleSite, purpose: str = "fine-tune", name: str = "rows.jsonl") -> str:
    answer = console.send("PUT", f"/files?filename={name}&purpose={purpose}", ROW)
    assert (answer.status_code, answer.headers["hx-redirect"]) == (204, "/api/v1/console/files")
    return console.catalog.files.page(purposes=[purpose], limit=1).files[0].id


def test_a_file_is_sent_shown_taken_back_and_deleted(console: ConsoleSite) -> None:
    assert "No file was sent yet" in console.get("/files").text
    file, other = sent(console), sent(console, "batch", "questions.jsonl")
    page = console.get("/files").text
    for shown in (file, other, "rows.jsonl", "questions.jsonl", f'href="/api/v1/console/jobs/new?file={file}"'):
        assert shown in page, shown
    assert f"jobs/new?file={other}" not in page
    assert file not in console.get("/files", purpose="batch").text
    answer = console.get(f"/files/{file}/content")
    assert answer.content == ROW
    assert answer.headers["content-disposition"] == "attachment; filename*=UTF-8''rows.jsonl"
    assert console.post(f"/files/{file}/delete").status_code == 204
    with pytest.raises(UserFileNotFound):
        console.catalog.files.get(file)
    assert console.get(f"/files/{file}/content").status_code == 404


def test_files_are_of_a_keys_scopes(console: ConsoleSite) -> None:
    sent(console)
    console.log_in(console.key("infer"))
    assert "rows.jsonl" not in console.get("/files").text
    refused = console.send("PUT", "/files?filename=a&purpose=fine-tune", ROW)
    assert (refused.status_code, "scope train" in refused.text) == (403, True)
    assert console.send("PUT", "/files?filename=a&purpose=batch_output", ROW).status_code == 400
    empty = console.send("PUT", "/files?filename=a&purpose=batch", b"")
    assert (empty.status_code, "empty" in empty.text) == (400, True)
    console.log_in(console.key("train", tenant="acme"))
    assert "No file was sent yet" in console.get("/files").text
    console.log_in(console.key("publish"))
    assert console.get("/files").status_code == 403


def test_a_recipe_begins_with_an_uploaded_file(console: ConsoleSite) -> None:
    file = sent(console)
    form = console.get("/jobs/new", file=file).text
    assert f'name="data.train" value="files://{file}"' in form
    assert f'<option value="files://{file}">rows.jsonl</option>' in form
    answer = console.post("/jobs", {"name": "new", "data.train": f"files://{file}", "rest": "metadata: {team: sales}"})
    (job,) = console.catalog.jobs.page().items
    assert answer.headers["hx-redirect"].endswith(f"/console/jobs/{job.id}")
    for path in ("/jobs", f"/jobs/{job.id}"):
        assert f'href="/api/v1/console/files#{file}"' in console.get(path).text
    assert "team: sales" in console.get(f"/jobs/{job.id}").text
    missing = console.post("/jobs", {"name": "new", "data.train": "files://file-unknown"})
    assert (missing.status_code, "there is no file" in missing.text) == (404, True)


def test_a_batch_is_followed_and_cancelled(console: ConsoleSite) -> None:
    assert "No batch was created yet" in console.get("/batches").text
    console.begin_batch()
    assert "batch-1" in console.get("/batches").text
    page = console.get("/batches/batch-1").text
    linked = ("/batches/batch-1/live", "/files/file-1/content")
    for shown in ("in progress", "5,000", "1,200", "team: sales", "the budget is used up", *linked):
        assert shown in page, shown
    assert 'value="1203" max="5000"' in console.get("/batches/batch-1/live").text
    assert console.post("/batches/batch-1/cancel").status_code == 204
    assert console.catalog.batches.get("batch-1").state == "cancelling"
    assert "Cancel</button>" not in console.get("/batches/batch-1").text
    assert console.get("/batches/nothing").status_code == 404
