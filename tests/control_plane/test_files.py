"""Files: OpenAI's shapes with its real SDK, and nothing half-written after any kind of failure."""

from __future__ import annotations

import errno
import hashlib
import os
import socket
import time
from pathlib import Path
from urllib.parse import urlsplit

import openai
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select
from sqlalchemy.orm import Session, sessionmaker

from control_plane.services import files
from parampara.db.models import File, Run, new_id
from parampara.db.session import transaction
from parampara.settings import Settings
from tests.control_plane.conftest import Upload, stored


def _sdk(base_url: str, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{base_url}/v1", api_key=key, max_retries=0, _strict_response_validation=True)


def test_the_openai_sdk_uploads_reads_lists_and_deletes(base_url: str, admin_key: str, plane_settings: Settings) -> None:
    sdk = _sdk(base_url, admin_key)
    made = [sdk.files.create(file=(f"part{number}.jsonl", b'{"text": "%d"}\n' % number), purpose="fine-tune") for number in range(5)]
    other = sdk.files.create(file=("notes.md", b"# notes"), purpose="assistants")
    assert made[0].object == "file"
    assert made[0].filename == "part0.jsonl"
    assert made[0].bytes == len(b'{"text": "0"}\n')

    walked = list(sdk.files.list(purpose="fine-tune", limit=2, order="asc"))
    assert [file.id for file in walked] == [file.id for file in made]
    assert [file.id for file in sdk.files.list(limit=4)] == [file.id for file in [other, *reversed(made)]]
    assert sdk.files.content(made[3].id).read() == b'{"text": "3"}\n'
    assert sdk.files.retrieve(other.id).purpose == "assistants"

    assert sdk.files.delete(other.id).deleted
    with pytest.raises(openai.NotFoundError) as gone:
        sdk.files.retrieve(other.id)
    assert gone.value.code == "file_not_found"
    assert stored(plane_settings) == sorted(f"{file.id}.jsonl" for file in made)


def test_files_are_deleted_while_the_list_is_walked(client: TestClient, upload: Upload) -> None:
    made = [upload(b"x", f"{number}.txt", "user_data") for number in range(5)]
    walked: list[str] = []
    page: dict = {"has_more": True, "last_id": None}
    while page["has_more"]:
        after = {"after": page["last_id"]} if page["last_id"] else {}
        page = client.get("/v1/files", params={"limit": 2, "order": "asc", **after}).json()
        for file in page["data"]:
            walked.append(file["id"])
            client.delete(f"/v1/files/{file['id']}")
    assert walked == made


def test_bytes_and_hash_are_those_sent(client: TestClient, sessions: sessionmaker[Session], plane_settings: Settings) -> None:
    content = os.urandom(700_000)  # many blocks, and any byte
    answer = client.post("/v1/files", files={"file": ("scan.pdf", content)}, data={"purpose": "user_data"}).json()
    with transaction(sessions) as session:
        row = session.get_one(File, answer["id"])
        assert row.sha256 == hashlib.sha256(content).hexdigest()
        assert row.bytes == len(content)
    assert (plane_settings.files_dir / f"{answer['id']}.pdf").read_bytes() == content
    assert client.get(f"/v1/files/{answer['id']}/content").content == content


@pytest.mark.parametrize(
    ("name", "label", "suffix"),
    [
        ("../../etc/passwd", "passwd", ""),
        ("..\\..\\windows\\system32\\x.TXT", "x.TXT", ".txt"),
        ("/abs/ book one.epub", "book one.epub", ".epub"),
        ("....", "file", ""),
        ("a\u202egpj.md", "a_gpj.md", ".md"),
        ("run.sh", "run.sh", ""),
        ("x" * 300 + ".jsonl", "x" * 74 + ".jsonl", ".jsonl"),
    ],
)
def test_a_name_is_only_ever_a_label(client: TestClient, plane_settings: Settings, name: str, label: str, suffix: str) -> None:
    answer = client.post("/v1/files", files={"file": (name, b"x")}, data={"purpose": "user_data"})
    assert answer.status_code == 200, answer.text
    assert answer.json()["filename"] == label
    assert stored(plane_settings) == [answer.json()["id"] + suffix]


@pytest.mark.parametrize(
    ("form", "param"),
    [
        ({"files": {"file": ("a.txt", b"")}, "data": {"purpose": "user_data"}}, "file"),
        ({"files": {"file": ("a.txt", b"x")}, "data": {"purpose": "world-peace"}}, "purpose"),
        ({"files": {"file": ("a.txt", b"x")}}, "purpose"),
        ({"files": {"other": ("a.txt", b"x")}, "data": {"purpose": "user_data"}}, "other"),
        ({"files": [("file", ("a.txt", b"x")), ("file", ("b.txt", b"y"))], "data": {"purpose": "user_data"}}, "file"),
        ({"files": {"purpose": (None, "user_data")}}, "file"),
        ({"files": {"file": ("a.txt", b"x")}, "data": {"purpose": "user_data", "colour": "red"}}, "colour"),
        ({"files": {"file": ("a.txt", b"x")}, "data": {"purpose": "x" * 5000}}, "purpose"),
        (
            {"files": {"file": ("a.txt", b"x")}, "data": {"purpose": "batch", "expires_after[anchor]": "created_at"}},
            "expires_after[anchor]",
        ),
        ({"json": {"file": "x", "purpose": "user_data"}}, None),
    ],
)
def test_a_bad_form_is_a_400_that_names_the_field(client: TestClient, plane_settings: Settings, form: dict, param: str | None) -> None:
    answer = client.post("/v1/files", **form)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert stored(plane_settings) == []


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"--b",
        b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--",
        b"no boundary at all",
        b"--b\r\n" + b"A" * 20_000 + b": x\r\n\r\n",
    ],
)
def test_a_malformed_form_is_a_400(client: TestClient, plane_settings: Settings, body: bytes) -> None:
    answer = client.post("/v1/files", content=body, headers={"Content-Type": "multipart/form-data; boundary=b"})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["code"] == "invalid_body"
    assert stored(plane_settings) == []


def test_a_file_over_the_limit_is_a_413(client: TestClient, plane_settings: Settings) -> None:
    over = b"x" * (plane_settings.max_upload_bytes + 1)
    declared = client.post("/v1/files", files={"file": ("a.txt", over)}, data={"purpose": "user_data"})
    assert declared.status_code == 413
    assert declared.json()["error"]["code"] == "payload_too_large"
    assert str(plane_settings.max_upload_bytes) in declared.json()["error"]["message"]
    huge = client.post("/v1/files", files={"file": ("a.txt", over * 2)}, data={"purpose": "user_data"})
    assert huge.status_code == 413
    assert stored(plane_settings) == []


def test_an_undeclared_body_over_the_limit_is_a_413_too(client: TestClient, plane_settings: Settings) -> None:
    def endless():
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.txt"\r\n\r\n'
        for _ in range(50):
            yield b"x" * 100_000

    answer = client.post("/v1/files", content=endless(), headers={"Content-Type": "multipart/form-data; boundary=b"})
    assert answer.status_code == 413
    assert stored(plane_settings) == []


def test_an_upload_cut_in_the_middle_leaves_nothing(
    base_url: str, admin_key: str, plane_settings: Settings, sessions: sessionmaker[Session]
) -> None:
    address = urlsplit(base_url)
    head = (
        f"POST /v1/files HTTP/1.1\r\nHost: {address.netloc}\r\nAuthorization: Bearer {admin_key}\r\n"
        "Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 500000\r\n\r\n"
        '--b\r\nContent-Disposition: form-data; name="file"; filename="book.txt"\r\n\r\n'
    )
    with socket.create_connection((address.hostname or "", address.port or 0)) as connection:
        connection.sendall(head.encode() + b"x" * 200_000)
        _wait_for(lambda: any(name.startswith(".upload-") for name in stored(plane_settings)))
    _wait_for(lambda: stored(plane_settings) == [])
    with transaction(sessions) as session:
        assert session.scalars(select(File)).all() == []


def test_a_form_without_its_end_leaves_nothing(client: TestClient, plane_settings: Settings) -> None:
    body = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.txt"\r\n\r\nhalf a bo'
    answer = client.post("/v1/files", content=body, headers={"Content-Type": "multipart/form-data; boundary=b"})
    assert answer.status_code == 400
    assert "cut short" in answer.json()["error"]["message"]
    assert stored(plane_settings) == []


@pytest.mark.parametrize("which", ["the bytes", "the folder"])
def test_a_full_disk_is_a_503_and_leaves_nothing(
    which: str, client: TestClient, plane_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    function = {"the bytes": "os.fsync", "the folder": "fsync_directory"}[which]
    monkeypatch.setattr(f"control_plane.services.files.{function}", full)
    answer = client.post("/v1/files", files={"file": ("a.txt", b"x")}, data={"purpose": "user_data"})
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "storage_full"
    assert answer.headers["Retry-After"]
    assert stored(plane_settings) == []


def test_bytes_go_again_when_the_row_can_not_be_written(
    client: TestClient, plane_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = files.show

    def fail(row: File) -> None:  # after the bytes have their name, before COMMIT
        assert (plane_settings.files_dir / f"{row.id}.txt").is_file()
        raise RuntimeError("the database went away")

    monkeypatch.setattr(files, "show", fail)
    answer = client.post("/v1/files", files={"file": ("a.txt", b"x")}, data={"purpose": "user_data"})
    assert answer.status_code == 500
    assert "went away" not in answer.text
    monkeypatch.setattr(files, "show", real)
    assert stored(plane_settings) == []
    assert client.get("/v1/files").json()["data"] == []


def test_what_a_killed_server_left_is_swept_away_after_an_hour(
    client: TestClient, plane_settings: Settings, sessions: sessionmaker[Session], upload: Upload
) -> None:
    kept = upload(b"kept", "kept.txt")
    partial, orphan = plane_settings.files_dir / ".upload-dead", plane_settings.files_dir / f"{new_id('file-')}.txt"
    young = plane_settings.files_dir / ".upload-young"
    for path in (partial, orphan, young):
        path.write_bytes(b"x")
    long_ago = time.time() - 7200
    for path in (partial, orphan, plane_settings.files_dir / f"{kept}.txt"):
        os.utime(path, (long_ago, long_ago))
    assert sorted(files.sweep(sessions, plane_settings)) == sorted([partial, orphan])
    assert stored(plane_settings) == sorted([f"{kept}.txt", young.name])


def test_a_file_that_an_unfinished_run_reads_is_not_deleted(client: TestClient, sessions: sessionmaker[Session], upload: Upload) -> None:
    book, qa = upload(b"book", "b.txt"), upload(b"{}", "q.jsonl")
    datasets = {"books": [book], "books_validation": [], "qa": [qa], "qa_validation": []}
    with transaction(sessions) as session:
        session.add(Run(id="run_1", name="r", recipe={}, datasets=datasets, state="running", extra={}))
    refused = client.delete(f"/v1/files/{qa}")
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "wrong_state"
    assert "run_1" in refused.json()["error"]["message"]
    with transaction(sessions) as session:
        session.get_one(Run, "run_1").state = "succeeded"
    assert client.delete(f"/v1/files/{qa}").json() == {"id": qa, "object": "file", "deleted": True}
    assert client.delete(f"/v1/files/{qa}").status_code == 404


@pytest.mark.parametrize("file_id", ["file-unknown", "file-" + "0" * 24, "..%2F..%2Fapi-key", "file-%00", "%ff%fe"])
def test_an_unknown_file_is_a_404(client: TestClient, file_id: str) -> None:
    for url in (f"/v1/files/{file_id}", f"/v1/files/{file_id}/content"):
        answer = client.get(url)
        assert answer.status_code == 404, answer.text
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("query", ["limit=0", "limit=10001", "limit=x", "order=sideways", "purpose=nothing", "after=%00"])
def test_a_bad_query_is_a_400_that_names_it(client: TestClient, query: str) -> None:
    answer = client.get(f"/v1/files?{query}")
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == query.split("=")[0] or query == "after=%00"


def test_bytes_that_are_gone_are_a_404_that_says_so(client: TestClient, upload: Upload, plane_settings: Settings) -> None:
    file_id = upload(b"x", "a.txt")
    Path(plane_settings.files_dir / f"{file_id}.txt").unlink()
    assert client.get(f"/v1/files/{file_id}/content").json()["error"]["code"] == "file_content_missing"


def _wait_for(condition, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
