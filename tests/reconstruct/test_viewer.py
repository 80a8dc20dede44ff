"""The viewer as a real process, seen from outside: key, origins, paths; and what it lists."""

import asyncio
import json
import os
import socket
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
import websockets.sync.client
from starlette.applications import Starlette

from capture.errors import DataError, UsageError
from reconstruct import report, result, viewer, web
from tests.reconstruct.small_result import small_result
from tests.reconstruct.viewer_server import viewer as real_viewer


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    for name in ("first", "second"):
        answer = small_result(name)
        result.save(answer, out, report_html=report.render_report(answer, []))
    (out.parent / "secret.txt").write_text("secret")
    (out / "private.txt").write_text("private")
    (out / "unfinished").mkdir()
    (out / "unfinished" / "aif.png").write_bytes(b"private")
    with real_viewer(out) as url:
        yield url


@pytest.fixture
def client(served):
    with httpx.Client(follow_redirects=True) as client:
        client.get(served).raise_for_status()
        yield client


def base(url):
    return f"http://{urlsplit(url).netloc}"


def test_lists_and_serves_results(served, client):
    names = [entry["name"] for entry in client.get(f"{base(served)}/results.json").json()]
    assert names == ["first", "second"]
    page = client.get(f"{base(served)}/results/first/report.html")
    assert page.status_code == 200
    assert "refocus" in page.text


def test_without_the_key_nothing(served):
    for path in ("/", "/results.json", "/results/first/aif.png", "/?token=wrong"):
        assert httpx.get(base(served) + path).status_code == 401, path


def test_the_cookie_is_not_for_scripts_or_other_sites(served):
    cookie = httpx.get(served).headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "samesite=strict" in cookie.lower()


@pytest.mark.parametrize(
    "headers",
    [{"Origin": "https://evil.example"}, {"Origin": "null"}, {"Origin": "http://[::1"}, {"Host": "evil.example"}],
)
def test_foreign_pages_are_refused(served, client, headers):
    assert client.get(f"{base(served)}/results.json", headers=headers).status_code == 403


def test_a_foreign_websocket_is_refused(served):
    address = f"ws://{urlsplit(served).netloc}/anything"
    for origin, status in ((None, 401), ("https://evil.example", 403)):
        with pytest.raises(websockets.exceptions.InvalidStatus) as refused:
            websockets.sync.client.connect(address, origin=origin).close()
        assert refused.value.response.status_code == status


def test_a_pair_is_compared_in_the_same_colours(served, client):
    answer = client.get(f"{base(served)}/pair.json", params={"left": "first", "right": "second", "what": "depth"})
    pair = answer.json()
    assert pair["left"] == pair["right"] and pair["words"] == "red 2.00 m to blue 4.00 m; median difference 0.00 mm"
    for wrong in ({"left": "first"}, {"left": "../out", "right": "second", "what": "depth"}, {"what": "depth"}):
        assert client.get(f"{base(served)}/pair.json", params=wrong).status_code == 404


@pytest.mark.parametrize(
    "path",
    [
        *("../secret.txt", "..%2fsecret.txt", "first/../../secret.txt", "%2e%2e/secret.txt", "first//etc/passwd"),
        *("private.txt", "/private.txt", "./private.txt", "first/../private.txt", "unfinished/aif.png", "first", ""),
        *("a" * 300, "first/" + "a" * 300, "first/%00"),
    ],
)
def test_nothing_but_files_of_finished_results(served, client, path):
    request = client.build_request("GET", base(served))
    request.url = request.url.copy_with(raw_path=f"/results/{path}".encode())
    assert client.send(request).status_code == 404


def offered(monkeypatch, out):
    """What the page would list of `daif view out`."""
    served = []
    monkeypatch.setattr(web, "serve", lambda app, *where: served.append(app))
    viewer.run(out, "127.0.0.1", 0)

    async def ask():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(served[0]), base_url="http://daif") as client:
            return (await client.get("/results.json")).json()

    return asyncio.run(ask())


def test_the_result_that_is_asked_for_is_opened_first(tmp_path, monkeypatch):
    for name in ("a", "b", "c"):
        result.save(small_result(name), tmp_path)
    monkeypatch.chdir(tmp_path / "b")
    for out in (tmp_path / "b", Path(".")):
        assert [(entry["name"], entry["first"]) for entry in offered(monkeypatch, out)] == [
            ("a", False),
            ("b", True),
            ("c", False),
        ]
    assert not any(entry["first"] for entry in offered(monkeypatch, tmp_path))


@pytest.mark.parametrize(
    "junk",
    [
        *({"not": 1}, [], {"metric": True, "method": None, "optics": {}}, {"metric": 1, "method": {"name": "\ud800"}}),
        *(b"{", b"\xff", b"[" * 100_000, "folder"),
    ],
    ids=lambda junk: repr(junk)[:20],
)
def test_a_folder_that_is_no_result_is_left_out_and_named(tmp_path, monkeypatch, capsys, junk):
    result.save(small_result("good"), tmp_path)
    name = os.fsdecode(b"caf\xe9") if junk == "folder" else "junk"
    (tmp_path / name).mkdir()
    (tmp_path / name / result.RECORD).write_bytes(junk if isinstance(junk, bytes) else json.dumps(junk).encode())
    assert [entry["name"] for entry in offered(monkeypatch, tmp_path)] == ["good"]
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and repr(os.fsencode(name))[2:-1] in said
    with pytest.raises(DataError, match=" left out: "):
        offered(monkeypatch, tmp_path / name)


@pytest.mark.parametrize(
    ("host", "port", "words"),
    [
        ("", 0, "--host is ''"),
        ("127.0.0.1", 99999, "--port is 99999; it must be 0 to 65535"),
        ("127.0.0.1", -1, "--port is -1"),
        ("a" * 70, 0, "choose another --host"),
    ],
)
def test_an_address_that_cannot_be_is_one_sentence(host, port, words):
    with pytest.raises(UsageError, match=words):
        web.serve(Starlette(), host, port, lambda url: pytest.fail(f"it listens at {url}"))


def test_a_port_in_use_is_one_sentence():
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UsageError, match="choose another"):
        web.serve(Starlette(), "127.0.0.1", taken.getsockname()[1], lambda url: None)
