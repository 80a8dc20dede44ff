"""`daif session` without a browser: a real server process with the simulated camera."""

import asyncio
import errno
import json
import random
import re
import subprocess
import sys
import time

import httpx
import psutil
import pytest
from pydantic import ValidationError
from websockets.asyncio.client import connect as connect_async
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from capture.cameras import open_camera
from capture.cameras.base import CameraInfo, Capabilities
from capture.errors import DataError, LockedError, NoSpaceError, UsageError
from capture.lens import Lens
from capture.stack import FocalStack, partial_path
from reconstruct import result, session_camera, web
from reconstruct.session import Session, _message, complaint, run
from reconstruct.session_folder import SessionFolder
from reconstruct.session_plan import Wishes, plan_facts, sweep_for
from reconstruct.session_work import Training, train_command
from tests.reconstruct.session_server import Page, idle, session
from tests.reconstruct.small_result import small_result

CAMERA = "simulated:procedural-3?width=96&max_coc_px=10"
LENS = Lens(focal_length_m=0.05, f_number=2.8, pixel_pitch_m=1.2e-5)
DIOPTRE = CameraInfo("x", "y", "", "z", Capabilities(focus="absolute", focus_unit="dioptre"))
STEPS = CameraInfo("x", "y", "", "z", Capabilities(focus="relative", focus_unit="step"))


def mark_everything(page):
    """Both marks a little inside the lens's stops, set as the operator does: move, press."""
    scale = page.until(idle)["camera"]["scale"]
    for which, share in (("near", 0.04), ("far", 0.96)):
        target = scale["near"] + share * (scale["far"] - scale["near"])
        page.say(do="focus", to=target)
        page.say(do="mark", which=which)
        page.until(lambda state, which=which: state["marks"][which] is not None)


# --- a whole session, once, with everything that needs a server


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("session") / "studio"


@pytest.fixture(scope="module")
def server(folder):
    with session(folder, CAMERA + "&latency_s=0.1&fault=disconnect@9x6", "--method", "plane-sweep") as running:
        yield running


def test_without_the_token_nothing_is_served(server):
    for path in ("/", "/live", "/results/001/report.html"):
        assert httpx.get(server.base + path).status_code == 401
    with pytest.raises(InvalidStatus) as refused, connect(server.base.replace("http", "ws") + "/live"):
        pass
    assert refused.value.response.status_code == 401


def test_foreign_pages_are_refused(server):
    evil = {"Origin": "http://evil.example"}
    assert server.http.get("/", headers=evil).status_code == 403
    assert server.http.get("/", headers={"Host": "evil.example"}).status_code == 403
    with pytest.raises(InvalidStatus) as refused, server.page(origin="http://evil.example"):
        pass
    assert refused.value.response.status_code == 403


def test_paths_out_of_the_results_do_not_exist(server):
    for path in (
        "../session.json",
        "..%2f..%2fsession.json",
        "%2e%2e/session.log",
        "/etc/passwd",
        "001/../../session.json",
    ):
        assert server.http.get("/results/" + path).status_code == 404


@pytest.mark.parametrize(
    "path",
    ["results/" + "a" * 300, "results/%00", f"frames/{'9' * 5000}/1.jpg", f"looks/take/{'9' * 5000}/depth.jpg"],
    ids=lambda path: path[:12],
)
def test_an_address_that_cannot_be_is_not_found(server, path):
    assert server.http.get("/" + path).status_code == 404


def test_an_origin_that_is_none_is_refused(server):
    assert httpx.get(server.base + "/", headers={"Origin": "http://[::1"}).status_code == 403


def test_a_value_that_cannot_be_is_answered_with_one_sentence(server):
    with server.page() as connection:
        page = Page(connection)
        page.until(idle)
        page.say(do="mark", which="near", metres=0.0005)
        assert page.answer() == "the distance in metres should be greater than or equal to 0.001, not 0.0005"


def test_the_page_asks_nobody_else(server):
    answer = server.http.get("/")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)[^\s\"'`]+", answer.text)


def test_only_loopback_listens(server):
    """Of all that the session and its children hold open, nothing can be reached from another machine."""
    session = psutil.Process(server.process.pid)
    sockets = [s for process in (session, *session.children(recursive=True)) for s in process.net_connections("inet")]
    listening = [s.laddr for s in sockets if s.status == psutil.CONN_LISTEN]
    assert ("127.0.0.1", int(server.base.rsplit(":", 1)[1])) in listening
    assert {address.ip for address in listening} == {"127.0.0.1"}
    assert all(s.raddr.ip == "127.0.0.1" for s in sockets if s.raddr)  # nor does it talk to one


def test_marks_plan_sweep_depth(server, folder):
    with server.page() as connection:
        page = Page(connection)
        state = page.until(idle)
        assert state["camera"]["exposure"]["iso"] == 100
        assert "mark the near and the far end" in state["plan"]["problem"]
        page.say(do="sweep")
        assert "mark the near" in page.answer()
        mark_everything(page)
        plan = page.until(lambda s: s["plan"]["problem"] is None)["plan"]
        assert len(plan["frames"]) == plan["count"] >= 5
        assert all(frame["typical_m"] > 0 for frame in plan["frames"])
        wide_open = plan["frames"][0]["typical_m"]
        page.say(do="plan", count=7, f_number=5.6)
        plan = page.until(lambda s: s["plan"]["count"] == 7)["plan"]
        assert plan["frames"][0]["typical_m"] == pytest.approx(
            2 * wide_open, rel=0.25
        )  # half the aperture, twice the error
        page.say(do="plan", count=5)
        page.until(lambda s: s["plan"]["count"] == 5)
        page.say(do="sweep")
        page.until(lambda s: s["camera"]["state"] == "sweeping")
        page.say(do="sweep")
        assert "running" in page.answer()
        take = page.until(lambda s: s["takes"] and s["takes"][0]["result"])["takes"][0]
        assert take["status"] == "complete" and take["frames"] == 5 and take["thumbnails"] == [0, 1, 2, 3, 4]
        assert take["facts"]["near_m"] < take["facts"]["far_m"]
        assert len(page.pictures) > 3 and all(picture[:2] == b"\xff\xd8" for picture in page.pictures)
        page.say(do="note", take=1, text="left lamp off")
        page.until(lambda s: s["takes"][0]["note"] == "left lamp off")
    for path in ("results/001/depth_color.png", "results/001/report.html", "frames/1/0.jpg"):
        assert server.http.get("/" + path).status_code == 200
    with FocalStack.open(folder / "takes" / "001.h5", deep=True) as stack:
        assert stack.n_frames == 5 and stack.is_metric


def test_an_unplugged_camera_is_said_and_the_take_resumed(server, folder):
    """Frame 9 of the camera's life fails more often than a sweep tries again: take 2 stops after 4 frames."""
    with server.page() as connection:
        page = Page(connection)
        page.until(idle)
        page.say(do="sweep")
        state = page.until(lambda s: len(s["takes"]) > 1 and s["takes"][1]["status"] == "unfinished", 120)
        assert state["takes"][1]["frames"] == 4
        assert "stopped answering" in state["takes"][1]["problem"] and "--" not in state["takes"][1]["problem"]
        for _ in range(8):  # what is left of the fault strikes again
            page.until(lambda s: s["camera"]["state"] in ("idle", "gone"))
            if page.state["camera"]["state"] == "gone":
                page.say(do="connect")
                page.until(idle)
            page.say(do="resume", take=2)
            page.until(lambda s: s["camera"]["state"] == "sweeping")
            page.until(lambda s: s["camera"]["state"] != "sweeping" and s["sweep"] is None, 120)
            if page.state["takes"][1]["status"] == "complete":
                break
        assert page.state["takes"][1]["frames"] == 5
    with FocalStack.open(folder / "takes" / "002.h5", deep=True) as stack:
        assert stack.n_frames == 5


def malformed_messages(count):
    rng = random.Random(0)
    kinds = [
        "", "{", "null", "[]", "1e999", '{"do":"focus","by":NaN}', '{"do":"focus","by":1e99}', '{"do":"sweep","x":1}',
        '{"do":"note","take":-1,"text":"x"}', '{"do":"mark","which":"middle"}', '{"do":"train","takes":[]}',
        json.dumps({"do": "note", "take": 1, "text": "x" * 3000}), "x" * 5000, "[" * 900, '{"do":"plan","count":"7"}',
    ]  # fmt: skip
    return [rng.choice(kinds) if rng.random() < 0.7 else rng.randbytes(rng.randrange(200)) for _ in range(count)]


async def hammer(server, messages, clients):
    """Everything in `messages` from `clients` pages at once, each as often as it is thrown out again."""
    shares = [messages[i::clients] for i in range(clients)]

    async def one(share):
        rest = list(share)
        while rest:
            async with connect_async(
                server.base.replace("http", "ws") + "/live",
                additional_headers={"Cookie": server.cookie},
                open_timeout=120,
                ping_interval=None,
            ) as connection:
                try:
                    while rest:
                        await connection.send(rest[-1])
                        rest.pop()
                        await asyncio.sleep(0)
                except ConnectionClosed:
                    continue

    await asyncio.gather(*(one(share) for share in shares))


def test_a_sweep_survives_a_hundred_clients_and_ten_thousand_malformed_messages(server, folder):
    with server.page() as connection:
        page = Page(connection)
        page.until(idle)
        page.say(do="plan", count=21)
        page.until(lambda s: s["plan"]["count"] == 21)
        page.say(do="sweep")
        page.until(lambda s: s["camera"]["state"] == "sweeping")
        asyncio.run(hammer(server, malformed_messages(10_000), 100))  # the sweep takes two seconds and more
        state = page.until(lambda s: len(s["takes"]) == 3 and s["takes"][2]["result"], 120)
        assert state["takes"][2]["frames"] == 21 and not state["takes"][2]["warnings"]
        assert len(state["takes"]) == 3
    with FocalStack.open(folder / "takes" / "003.h5", deep=True) as stack:
        assert stack.n_frames == 21


def test_a_second_session_on_the_folder_is_told_who_has_it(server, folder):
    with pytest.raises(LockedError, match=str(server.process.pid)):
        SessionFolder(folder, CAMERA)


def test_stopped_and_opened_again_it_continues(server, folder):
    assert server.stop() == 130
    assert not (folder / "session.json.lock").exists()
    with session(folder, CAMERA, "--method", "plane-sweep") as again, again.page() as connection:
        page = Page(connection)
        state = page.until(idle)
        assert [take["number"] for take in state["takes"]] == [1, 2, 3]
        assert state["takes"][0]["note"] == "left lamp off" and state["takes"][0]["result"]
        mark_everything(page)
        page.say(do="sweep")
        page.until(lambda s: len(s["takes"]) == 4 and s["takes"][3]["frames"] >= 1)
        page.say(do="stop")
        page.until(lambda s: s["sweep"] is None)
        assert page.state["takes"][3]["status"] in ("unfinished", "complete")
    assert "take 004: started" in (folder / "session.log").read_text()


# --- without a server


def test_the_plan_follows_marks_aperture_and_count():
    wishes = Wishes(near=1 / 0.6, far=1 / 2.0)
    sweep = sweep_for(wishes, DIOPTRE, LENS)
    assert sweep.near_m == pytest.approx(0.6) and sweep.far_m == pytest.approx(2.0)
    swapped = sweep_for(Wishes(near=1 / 2.0, far=1 / 0.6), DIOPTRE, LENS)
    assert swapped.focus_distance_m == pytest.approx(sweep.focus_distance_m)
    open_wide = plan_facts(wishes.changed(count=7), DIOPTRE, LENS, None, 1.0)
    stopped_down = plan_facts(wishes.changed(count=7, f_number=11.2), DIOPTRE, LENS, None, 1.0)
    assert stopped_down["range_px"] == pytest.approx(open_wide["range_px"] / 4, rel=1e-6)
    assert plan_facts(Wishes(near=1.0), DIOPTRE, LENS, None, 1.0)["problem"].startswith("mark the near")
    assert "same distance" in plan_facts(Wishes(near=1.0, far=1.0), DIOPTRE, LENS, None, 1.0)["problem"]


def test_a_motor_without_calibration_is_swept_in_its_own_steps():
    sweep = sweep_for(Wishes(near=10.0, far=210.0, count=5), STEPS, LENS)
    assert list(sweep) == [10, 60, 110, 160, 210] and sweep.unit == "step"
    assert "without metres" in plan_facts(Wishes(near=10.0, far=210.0), STEPS, LENS, None, 1.0)["warnings"][0]


@pytest.mark.parametrize("text", sorted({m for m in malformed_messages(300) if isinstance(m, str) and len(m) < 4096}))
def test_malformed_messages_are_refused(text):
    with pytest.raises(ValueError):
        _message.validate_json(text)


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        ({"do": "plan", "count": 1}, "the number of frames should be greater than or equal to 2, not 1"),
        ({"do": "plan", "f_number": 0.3}, "the f-number should be greater than or equal to 0.5, not 0.3"),
        ({"do": "plan", "count": "7"}, "the number of frames should be a valid integer"),
        ({"do": "note", "take": 1, "text": "x" * 501}, "the note should have at most 500 characters"),
        ({"do": "train", "takes": [1] * 201}, "the list of ticked takes should have at most 200 items, not 201"),
        ({"do": "train", "takes": [0]}, "the list of ticked takes should be greater than or equal to 1, not 0"),
        ({"do": "dance"}, None),
        ({"do": "sweep", "now": True}, None),
    ],
)
def test_what_is_said_of_a_wrong_value(message, sentence):
    with pytest.raises(ValidationError) as wrong:
        _message.validate_json(json.dumps(message))
    assert complaint(wrong.value) == sentence


def test_weights_that_do_not_exist_are_named_before_the_first_take(tmp_path, monkeypatch):
    monkeypatch.setattr(web, "serve", lambda *where: pytest.fail("the session has begun"))
    with pytest.raises(DataError, match=r"nope\.json: missing"):
        run(CAMERA, tmp_path / "out", lens=None, method="network", weights=str(tmp_path / "nope.safetensors"))
    assert not (tmp_path / "out").exists()


def test_a_session_that_cannot_listen_leaves_its_folder_unlocked(tmp_path):
    with pytest.raises(UsageError, match="--port is 99999"):
        run(CAMERA, tmp_path, lens=None, method="plane-sweep", port=99999)
    assert not (tmp_path / "session.json.lock").exists()


# --- the camera's thread, step by step


@pytest.fixture
def by_hand(tmp_path):
    """A session with marks and a connected camera whose commands `step` carries out."""
    folder = SessionFolder(tmp_path / "studio", CAMERA)
    session = Session(folder, open_camera(CAMERA), method="plane-sweep")
    session.camera._connect()
    limits = session.camera.limits
    folder.wish(near=0.96 * limits.near + 0.04 * limits.far, far=0.04 * limits.near + 0.96 * limits.far, count=3)
    yield session
    session.camera.camera.let_go()
    folder.close()


def step(session):
    session.camera._commands.get_nowait()()


def say(session, **message):
    return session.obey(_message.validate_json(json.dumps(message)))


def test_a_sweep_can_be_stopped_before_it_has_begun(by_hand):
    assert say(by_hand, do="sweep") is None and by_hand.camera.state == "starting"
    assert say(by_hand, do="sweep") == "a sweep is running already"
    assert say(by_hand, do="stop") is None
    step(by_hand)
    assert by_hand.camera.state == "idle" and by_hand.folder.record.takes == []
    assert say(by_hand, do="sweep") is None  # and the next one is not stopped with it
    step(by_hand)
    assert [(take.number, take.status) for take in by_hand.folder.record.takes] == [(1, "complete")]


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), NoSpaceError("full")])
def test_a_full_disk_in_mid_sweep_is_one_sentence(by_hand, monkeypatch, failure):
    def fill(camera, sweep, path, **options):
        partial_path(path).write_bytes(b"")
        raise failure

    monkeypatch.setattr(session_camera, "run_sweep", fill)
    say(by_hand, do="sweep")
    step(by_hand)
    take = by_hand.folder.take(1)
    assert take.status == "unfinished" and by_hand.camera.state == "idle"
    assert re.match(r"the disk (of .* )?is full[;:] free some space", take.problem) and "bug" not in take.problem


def test_a_session_goes_on_without_the_disk_of_its_folder(by_hand, tmp_path):
    """Unplugged: every command is answered with a sentence at most, and plugged in again nothing was forgotten."""
    say(by_hand, do="sweep")
    step(by_hand)
    assert by_hand.state()["disk"]["problem"] is None
    (tmp_path / "studio").rename(tmp_path / "unplugged")
    assert say(by_hand, do="note", take=1, text="left lamp off") is None
    assert "cannot be used (No such file" in by_hand.state()["disk"]["problem"]
    for message in ({"do": "train", "takes": [1]}, {"do": "reconstruct", "take": 1}):
        assert "its stack is not at" in say(by_hand, **message)
    say(by_hand, do="sweep")
    step(by_hand)
    assert by_hand.camera.state == "idle" and "cannot be used" in by_hand.camera.problem
    (tmp_path / "unplugged").rename(tmp_path / "studio")
    assert "cannot be written" in by_hand.state()["disk"]["problem"]
    say(by_hand, do="plan", count=4)
    assert by_hand.state()["disk"]["problem"] is None
    say(by_hand, do="sweep")
    step(by_hand)
    takes = json.loads((tmp_path / "studio" / "session.json").read_text())["takes"]
    assert [(take["note"], take["frames"]) for take in takes] == [("left lamp off", 3), ("", 4)]


# --- the folder


@pytest.mark.parametrize("name", ["000.h5", "²³⁴.h5", "1.h5", "0000000.h5", "notes.h5"])
def test_a_file_that_is_no_take_is_left_alone(tmp_path, name):
    (tmp_path / "takes").mkdir()
    (tmp_path / "takes" / name).write_bytes(b"x")
    folder = SessionFolder(tmp_path, CAMERA)
    assert folder.record.takes == [] and folder.begin(3).number == 1
    folder.close()


@pytest.mark.parametrize("name", ["session.json", "session.json.lock", ".session.json.partial"])
def test_a_folder_where_a_file_should_be_is_one_sentence(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(DataError if name == "session.json" else UsageError, match="directory"):
        SessionFolder(tmp_path, CAMERA)


def test_a_damaged_record_is_named_and_left_alone(tmp_path):
    SessionFolder(tmp_path, CAMERA).close()
    (tmp_path / "session.json").write_text('{"format": "daif-session/1", "created": "x", "camera": "y", "takes": 3}')
    with pytest.raises(DataError, match=r"session\.json: takes"):
        SessionFolder(tmp_path, CAMERA)
    assert not (tmp_path / "session.json.lock").exists()


def test_takes_of_which_nothing_is_left_are_forgotten(tmp_path):
    folder = SessionFolder(tmp_path, CAMERA)
    folder.begin(5)
    folder.close()
    again = SessionFolder(tmp_path, CAMERA)
    assert again.record.takes == []
    again.close()


@pytest.mark.parametrize("left", ["takes/007.h5", "takes/007.h5.partial", "results/007"])
def test_a_number_is_never_given_twice(tmp_path, left):
    """An archived stack leaves its result behind, and the other way round."""
    folder = SessionFolder(tmp_path, CAMERA)
    (tmp_path / left).mkdir()
    assert folder.begin(5).number == 8
    folder.close()


def test_a_take_whose_stack_is_in_an_archive_keeps_its_result_and_note(tmp_path):
    folder = SessionFolder(tmp_path, CAMERA)
    number = folder.begin(4).number
    folder.update(number, status="complete", frames=4, note="left lamp off")
    folder.close()
    result.save(small_result("001"), tmp_path / "results")
    again = SessionFolder(tmp_path, CAMERA)
    take = again.take(1)
    assert (take.status, take.frames, take.note) == ("complete", 4, "left lamp off")
    session = Session(again, camera=None)
    for message in ({"do": "reconstruct", "take": 1}, {"do": "train", "takes": [1]}):
        said = session.obey(_message.validate_json(json.dumps(message)))
        assert said == f"take 1: its stack is not at {tmp_path / 'takes/001.h5'}; put it back there and try again"
    assert again.begin(4).number == 2
    again.close()


def test_a_file_cannot_be_a_session(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="choose another -o"):
        SessionFolder(tmp_path / "file", CAMERA)


# --- training: the process around `daif train`

WRITES_WEIGHTS = """
import sys, pathlib
print("refining 1 stack(s)", file=sys.stderr, flush=True)
out = pathlib.Path(sys.argv[1]); out.mkdir(parents=True); (out / "weights.safetensors").write_bytes(b"x")
print("mean  10.0  9.0  -10 %")
"""


def wait_for(training):
    deadline = time.monotonic() + 60
    while training.state == "running" and time.monotonic() < deadline:
        time.sleep(0.05)
    return training.state


def test_training_hands_on_lines_and_table(tmp_path):
    run = tmp_path / "01"
    training = Training([sys.executable, "-c", WRITES_WEIGHTS, str(run)], [1], run, lambda training: None)
    assert wait_for(training) == "finished"
    assert list(training.lines) == ["refining 1 stack(s)"] and training.table == ["mean  10.0  9.0  -10 %"]
    assert training.weights == run / "weights.safetensors"


def test_looks_are_asked_for_when_a_run_has_ended_before_the_session_knows_it(tmp_path):
    folder = SessionFolder(tmp_path, CAMERA)
    session = Session(folder, camera=None, method="plane-sweep")
    session.held_out, asked = 1, []
    session.looker.add = asked.append
    run = tmp_path / "training" / "01"
    training = Training([sys.executable, "-c", WRITES_WEIGHTS, str(run)], [1], run, session._training_changed)
    training._waiter.join()
    assert session.training is None
    assert [job.purpose for job in asked] == ["before", "after"]
    folder.close()


def test_a_stopped_training_ends_and_offers_nothing(tmp_path):
    training = Training([sys.executable, "-c", "import time; time.sleep(60)"], [1], tmp_path, lambda training: None)
    began = time.monotonic()
    training.stop()
    assert training.state == "stopped" and training.weights is None and time.monotonic() - began < 20


def test_a_failed_training_says_the_command_line_s_sentence(tmp_path):
    command = train_command([tmp_path / "none.h5"], tmp_path / "01", init="default", lens=None, device="cpu")
    training = Training(command, [1], tmp_path / "01", lambda training: None)
    assert wait_for(training) == "failed"
    assert "none.h5 does not exist" in training.problem and not training.problem.startswith("daif:")


def test_accepted_weights_are_used_for_what_follows(tmp_path):
    folder = SessionFolder(tmp_path, CAMERA)
    session = Session(folder, camera=None, method="plane-sweep")
    assert session._network() is None
    weights = tmp_path / "training" / "01" / "weights.safetensors"
    session.training = Training(
        [sys.executable, "-c", WRITES_WEIGHTS, str(weights.parent)], [1], weights.parent, lambda training: None
    )
    assert wait_for(session.training) == "finished"
    assert session._decide("train_accept") is None
    assert session._network() == str(weights)
    folder.close()
    again = SessionFolder(tmp_path, CAMERA)
    assert again.weights == weights
    again.close()


def test_help_names_the_command():
    said = subprocess.run(
        [sys.executable, "-c", "from reconstruct.cli import main; main()", "session", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--camera" in said.stdout
