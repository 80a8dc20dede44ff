"""The viewer as a real process, seen from outside: key, origins, paths."""

from urllib.parse import urlsplit

import httpx
import pytest
import websockets.sync.client

from reconstruct import report, result
from tests.reconstruct.small_result import small_result
from tests.reconstruct.viewer_server import viewer


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    for name in ("first", "second"):
        answer = small_result(name)
        result.save(answer, out, report_html=report.render_report(answer, []))
    (out.parent / "secret.txt").write_text("secret")
    with viewer(out) as url:
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


@pytest.mark.parametrize("headers", [{"Origin": "https://evil.example"}, {"Origin": "null"}, {"Host": "evil.example"}])
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


@pytest.mark.parametrize("path", ["../secret.txt", "..%2fsecret.txt", "first/../../secret.txt", "%2e%2e/secret.txt"])
def test_no_way_out_of_the_folder(served, client, path):
    request = client.build_request("GET", base(served))
    request.url = request.url.copy_with(raw_path=f"/results/{path}".encode())
    assert client.send(request).status_code == 404
