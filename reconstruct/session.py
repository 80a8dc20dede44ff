"""`daif session`: a tethered camera on a page, depth seconds after the last frame.

The page is `pages/session.html`. State goes out as JSON over one WebSocket, live view as JPEG over the same (the next
picture leaves when the last one was acknowledged, so a slow client drops pictures instead of hoarding them);
commands come in as the models below. The camera has its own thread (`session_camera.py`), reconstruction and training
have their own processes (`session_work.py`), and the server never waits for any of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import re
import shutil
import time
import webbrowser
from collections.abc import AsyncIterator, Callable
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from starlette.applications import Starlette
from starlette.convertors import IntegerConvertor, register_url_convertor
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from capture.cameras import open_camera
from capture.cameras.base import Camera
from capture.errors import DaifError, UsageError
from capture.lens import Lens, LensProfile
from capture.plan import MAX_FRAMES, Optic, read_lens
from capture.stack import partial_path
from capture.sweep import SweepOptions, stored_plan
from reconstruct import web
from reconstruct.session_camera import CameraThread
from reconstruct.session_folder import SessionFolder, Take
from reconstruct.session_plan import Wishes, distance_m, optics_with, plan_facts, position_at, scale_facts, sweep_for
from reconstruct.session_work import FULL_NICE, FullJob, LookJob, News, Reconstructor, Training, train_command

Found = TypeVar("Found")

MAX_MESSAGE_BYTES = 4096
MALFORMED_ALLOWED = 50  # per connection; then it is closed
SENDS_PER_S = 100  # live pictures in all, whoever is watching
STATE_PERIOD_S = 0.05
DISK_LOW_BYTES = 2_000_000_000
BATTERY_LOW_PERCENT = 20


# --- what a page may say


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Seen(Message):
    """The last live picture was shown; send the next."""

    do: Literal["seen"]


class Focus(Message):
    """Move the lens by a share of its travel, or to a position in the camera's unit."""

    do: Literal["focus"]
    by: float | None = Field(default=None, ge=-1, le=1)
    to: float | None = Field(default=None, allow_inf_nan=False)


class Mark(Message):
    """The near or far end of the scene: here, or at a distance in metres; clear forgets it."""

    do: Literal["mark"]
    which: Literal["near", "far"]
    metres: float | None = Field(default=None, ge=1e-3, le=1e6)
    clear: bool = False


class Plan(Message):
    """Number of frames and f-number; None is automatic, or the lens's own."""

    do: Literal["plan"]
    count: int | None = Field(default=None, ge=2, le=MAX_FRAMES)
    f_number: float | None = Field(default=None, ge=0.5, le=128)


class Plain(Message):
    """Commands without details."""

    do: Literal["sweep", "stop", "connect", "answer", "train_stop", "train_accept", "train_discard"]


class OfTake(Message):
    """Commands about one take."""

    do: Literal["resume", "reconstruct"]
    take: int = Field(ge=1, le=10**6)


class Note(Message):
    """A note on a take."""

    do: Literal["note"]
    take: int = Field(ge=1, le=10**6)
    text: str = Field(max_length=500)


class Train(Message):
    """Fine-tune on these takes."""

    do: Literal["train"]
    takes: list[Annotated[int, Field(ge=1, le=10**6)]] = Field(min_length=1, max_length=200)


AnyMessage = Annotated[Seen | Focus | Mark | Plan | Plain | OfTake | Note | Train, Field(discriminator="do")]
_message: TypeAdapter[Any] = TypeAdapter(AnyMessage)

NAMES = {
    "metres": "the distance in metres",
    "count": "the number of frames",
    "f_number": "the f-number",
    "take": "the number of the take",
    "text": "the note",
    "takes": "the list of ticked takes",
    "by": "the share of the lens's travel",
    "to": "the position of the lens",
}


def complaint(error: ValidationError) -> str | None:
    """What is wrong with a value that somebody has typed, in one sentence; None for what no page of ours sends."""
    first = error.errors(include_url=False)[0]
    name = NAMES.get(str(first["loc"][1])) if len(first["loc"]) > 1 else None
    if name is None:
        return None
    found = f", not {first['input']:g}" if isinstance(first["input"], int | float) else ""
    return re.sub(r"^\w+ should", f"{name} should", first["msg"]).replace(" after validation", "") + found


class Client:
    """One open page."""

    def __init__(self) -> None:
        self.wake = asyncio.Event()
        self.version = -1
        self.picture = -1
        self.unseen = 0
        self.sent_s = 0.0
        self.malformed = 0
        self.reply: str | None = None


class Session:
    """Everything behind the page.

    Args:
        folder: where takes and results go.
        lens_file: lens profile for reconstruction, None where optics come from words or the camera.
        optic: what is known of the optics.
        method, weights: how takes are reconstructed until fine-tuned weights are accepted.
        train_steps: steps of a fine-tuning run, None for the default.
    """

    def __init__(
        self,
        folder: SessionFolder,
        camera: Camera,
        *,
        optic: Optic | None = None,
        lens_file: Path | None = None,
        method: str = "plane-sweep",
        weights: str = "default",
        refine_steps: int = 0,
        device: str = "auto",
        options: SweepOptions | None = None,
        train_steps: int | None = None,
    ) -> None:
        self.folder, self.optic, self.lens_file = folder, optic, lens_file
        self.method, self.weights, self.refine_steps, self.device = method, weights, refine_steps, device
        self.train_steps = train_steps
        self.clients: set[Client] = set()
        self.version = 0
        self.picture: tuple[int, bytes] = (0, b"")
        self.looks: dict[tuple[str, int], Any] = {}
        self.look_version = 0
        self.at_work: dict[type, dict[str, Any]] = {}
        self.failures: dict[int, str] = {}
        self.training: Training | None = None
        self.held_out: int | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._plan_cache: tuple[Any, dict[str, Any]] = (None, {})
        self.camera = CameraThread(
            camera,
            folder,
            optic,
            options or SweepOptions(),
            changed=self.changed,
            pictured=self._pictured,
            captured=self._captured,
        )
        self.camera.watched = lambda: bool(self.clients)
        self.looker = Reconstructor(self._news, device, wanted=self._wanted, warm=True, on_ready=self.changed)
        self.reconstructor = Reconstructor(self._news, device, nice=FULL_NICE)

    # --- life

    @contextlib.asynccontextmanager
    async def running(self, app: Starlette) -> AsyncIterator[None]:
        """Camera, reconstruction and folder, from the server's start to its end."""
        self._loop = asyncio.get_running_loop()
        self.folder.log("session opened")
        self.camera.start()
        self.looker.start()
        self.reconstructor.start()
        try:
            yield
        finally:
            await asyncio.to_thread(self._close)

    def _close(self) -> None:
        self.camera.close()
        if self.training is not None and self.training.state == "running":
            self.training.stop()
        self.looker.close()
        self.reconstructor.close()
        self.folder.log("session closed")
        self.folder.close()

    # --- news from other threads

    def changed(self) -> None:
        """Something to show has changed; callable from every thread."""
        self.version += 1
        self._wake()

    def _wake(self) -> None:
        if self._loop is not None and not self._loop.is_closed():
            with contextlib.suppress(RuntimeError):  # the loop ended between the two lines
                self._loop.call_soon_threadsafe(self._wake_clients)

    def _wake_clients(self) -> None:
        for client in self.clients:
            client.wake.set()

    def _pictured(self, jpeg: bytes) -> None:
        self.picture = (self.picture[0] + 1, jpeg)
        self._wake()

    def _captured(self, number: int, complete: bool) -> None:
        """A frame was stored: look at what is there, unless the looks are behind; at the last one in any case.

        The sweep ends some time after its last frame, when the lens is back where it stood; the look does not wait.
        """
        take = self.folder.take(number)
        stack = self.folder.stack(number)
        if complete:
            self._look_at(number, stack)
            self._reconstruct(number)
        elif take is not None and take.frames >= 3 and (self.looker.idle or take.frames == take.planned):
            self._look_at(number, partial_path(stack))
        self.changed()

    def _wanted(self, job: LookJob | FullJob) -> bool:
        """Whether a look would show more than the one that is shown."""
        take = self.folder.take(job.number)
        if take is None or take.facts is None or not isinstance(job, LookJob) or job.purpose != "take":
            return True
        return take.facts["n_frames"] < take.frames

    def _news(self, news: News) -> None:
        job = news.job
        if isinstance(job, LookJob) and job.purpose == "take" and self.folder.has_result(job.number):
            pass  # overtaken by the full reconstruction
        elif news.what == "look" and isinstance(job, LookJob):
            look = news.content
            if job.purpose == "take":  # facts first: `_take_facts` may tell of the look as soon as it is there
                names = ("near_m", "far_m", "std_m", "confident", "n_frames", "seconds")
                self.folder.update(job.number, facts={name: getattr(look, name) for name in names})
            self.looks[job.purpose, job.number] = look
            self.look_version += 1
            take = self.folder.take(job.number)
            if job.purpose == "take" and take is not None and look.n_frames == take.planned:
                self.folder.log(
                    f"take {job.number:03d}: first look, {look.seconds:.1f} s ({look.cpu_seconds:.1f} s CPU)"
                )
        elif news.what == "full":
            self.failures.pop(job.number, None)
            self.folder.update(job.number, facts=news.content)
            self.look_version += 1
            self.folder.log(f"take {job.number:03d}: reconstructed in {news.content['seconds']:.1f} s")
        elif news.what == "failed" and not (isinstance(job, LookJob) and job.stack.suffix == ".partial"):
            self.failures[job.number] = news.text
            self.folder.log(f"take {job.number:03d}: {news.text}")
        if news.what in ("started", "progress"):
            full = isinstance(job, FullJob)
            text = news.text or ("reconstructing" if full else "first look")
            self.at_work[type(job)] = {"text": text, "share": news.share if full else None, "take": job.number}
        else:
            self.at_work.pop(type(job), None)
        self.changed()

    # --- reconstruction

    def _network(self) -> str | None:
        """Weights that takes are reconstructed with, None for the plane sweep."""
        accepted = self.folder.weights
        if accepted is not None:
            return str(accepted)
        return self.weights if self.method == "network" else None

    def describe_method(self) -> str:
        """What takes are reconstructed with, in words."""
        if self.folder.weights is not None:
            return f"network, fine-tuned here ({self.folder.record.weights})"
        return "network" if self.method == "network" else "plane sweep"

    def _look_at(self, number: int, stack: Path) -> None:
        self.looker.add(LookJob(number, stack, self.lens_file))

    def _reconstruct(self, number: int) -> None:
        network = self._network()
        self.reconstructor.add(
            FullJob(
                number,
                self.folder.stack(number),
                self.lens_file,
                self.folder.results,
                "plane-sweep" if network is None else "network",
                network or "default",
                self.refine_steps,
                self.device,
            )
        )

    # --- commands

    def obey(self, message: Any) -> str | None:
        """Carry out a page's message; the reply is a sentence where it cannot be done."""
        try:
            return self._obey(message)
        except DaifError as error:
            return str(error)
        except OSError as error:
            return str(self.folder.unusable(error))

    def _obey(self, message: Any) -> str | None:
        match message:
            case Focus():
                return self._focus(message)
            case Mark():
                return self._mark(message)
            case Plan():
                self.folder.wish(count=message.count, f_number=message.f_number)
            case Note():
                self.folder.update(message.take, note=message.text)
            case OfTake(do="resume"):
                return self._resume(message.take)
            case OfTake():
                return self._again(message.take)
            case Train():
                return self._train(message.takes)
            case Plain(do="sweep"):
                return self._sweep()
            case Plain(do="stop"):
                self.camera.stop()
            case Plain(do="answer"):
                self.camera.answer()
            case Plain(do="connect"):
                if self.camera.state == "gone" and not self.camera.connect():
                    return "the camera is busy; wait a moment"
            case Plain():
                return self._decide(message.do)
        self.changed()
        return None

    def _focus(self, message: Focus) -> str | None:
        if self.camera.state != "idle":
            return "the focus can be moved when the camera is connected and no sweep is running"
        if self.camera.limits is None:
            return "this lens is turned by hand"
        if message.to is not None:
            self.camera.focus(message.to)
        elif message.by is not None:
            self.camera.nudge(message.by)
        return None

    def _mark(self, message: Mark) -> str | None:
        if message.clear:
            self.folder.wish(**{message.which: None})
        elif self.camera.info is None:
            return "no camera is connected"
        elif message.metres is not None:
            position = position_at(message.metres, self.camera.info, self._optic())
            limits = self.camera.limits
            if limits is not None and not limits.contains(position):
                return f"{message.metres:g} m is beyond the lens's stop"
            self.folder.wish(**{message.which: position})
        elif self.camera.aim is None:
            return "the position of the lens is not known yet; move the focus once, or type the distance"
        else:
            self.folder.wish(**{message.which: self.camera.aim})
        self.changed()
        return None

    def _optic(self) -> Optic | None:
        return self.optic or (None if self.camera.info is None else self.camera.info.lens)

    def _sweep(self) -> str | None:
        info = self.camera.info
        if info is None or self.camera.state != "idle":
            running = self.camera.state in ("starting", "sweeping")
            return "a sweep is running already" if running else "no camera is connected"
        sweep = sweep_for(self.wishes, info, self._optic())
        if sweep is None:
            return "mark the near and the far end of the scene first"
        optic = optics_with(self._optic(), self.wishes.f_number)
        if isinstance(optic, Lens):
            sweep = sweep.model_copy(update={"lens": optic})
        return None if self.camera.take(sweep, optic, self._asked_f_number()) else "the camera is busy; wait a moment"

    def _asked_f_number(self) -> float | None:
        """The f-number that the camera must be set to; None leaves it alone."""
        optic = self._optic()
        return self.wishes.f_number if isinstance(optic, Lens) and self.wishes.f_number != optic.f_number else None

    def _resume(self, number: int) -> str | None:
        take = self.folder.take(number)
        if take is None or take.status != "unfinished":
            return f"take {number} is not an unfinished take"
        if self.camera.info is None or self.camera.state != "idle":
            return "connect the camera first"
        sweep = stored_plan(self.folder.stack(number))
        f_number = sweep.lens.f_number if sweep.lens is not None else None
        optic = self._optic()
        changed = f_number if isinstance(optic, Lens) and f_number != optic.f_number else None
        started = self.camera.resume(number, sweep, optics_with(optic, changed), changed)
        return None if started else "the camera is busy; wait a moment"

    def _again(self, number: int) -> str | None:
        take = self.folder.take(number)
        if take is None or take.status != "complete":
            return f"take {number} is not complete"
        self._look_at(number, self.folder.stored(number))
        self._reconstruct(number)
        self.changed()
        return None

    def _train(self, numbers: list[int]) -> str | None:
        if self.training is not None and self.training.state == "running":
            return "a training run is going on"
        takes = [self.folder.take(number) for number in numbers]
        picked = [take.number for take in takes if take is not None and take.status == "complete"]
        if not picked:
            return "pick at least one complete take"
        stacks = [self.folder.stored(number) for number in picked]
        others = [
            take.number
            for take in self.folder.record.takes
            if take.status == "complete" and self.folder.stack(take.number).exists()
        ]
        self.looks = {key: look for key, look in self.looks.items() if key[0] == "take"}  # of this run only
        self.held_out = next((number for number in reversed(others) if number not in picked), picked[-1])
        run = self.folder.new_training()
        command = train_command(
            stacks,
            run,
            init=str(self.folder.weights or self.weights),
            lens=self.lens_file,
            device=self.device,
            steps=self.train_steps,
        )
        self.folder.log(f"training {run.name}: takes {', '.join(map(str, picked))}")
        self.training = Training(command, picked, run, self._training_changed)
        self.changed()
        return None

    def _training_changed(self, training: Training) -> None:
        if training.state == "finished" and training.weights is not None:
            assert self.held_out is not None
            stack = self.folder.stack(self.held_out)
            for purpose, weights in (("before", self._network()), ("after", str(training.weights))):
                self.looker.add(LookJob(self.held_out, stack, self.lens_file, weights, purpose))  # type: ignore[arg-type]
        self.changed()

    def _decide(self, do: str) -> str | None:
        training = self.training
        if training is None:
            return "there is no training run"
        if do == "train_stop":
            if training.state == "running" and self._loop is not None:
                self._loop.run_in_executor(None, training.stop)
            return None
        if training.state == "running":
            return "the training run has not ended"
        if do == "train_accept":
            if training.weights is None:
                return "this run brought no better weights"
            self.folder.accept_weights(training.weights)
        self.folder.log(f"training {training.out.name}: {'accepted' if do == 'train_accept' else 'discarded'}")
        self.training = None
        self.changed()
        return None

    # --- what the page shows

    def state(self) -> dict[str, Any]:
        """Everything that the page shows, JSON-ready."""
        camera, optic = self.camera, self._optic()
        info = camera.info
        facts: dict[str, Any] = {
            "session": self.folder.path.name,
            "method": self.describe_method(),
            "camera": self._camera_facts(),
            "marks": {which: self._mark_facts(getattr(self.wishes, which)) for which in ("near", "far")},
            "plan": None if info is None else self._plan_facts(),
            "wishes": {"count": self.wishes.count, "f_number": self.wishes.f_number},
            "f_number": None if optic is None else optic.f_number,
            "f_number_free": isinstance(optic, Lens),
            "sweep": None if camera.sweep is None else self._sweep_facts(),
            "question": camera.question,
            "takes": [self._take_facts(take) for take in self.folder.record.takes],
            "work": {"ready": self.looker.ready, **self._work_facts()},
            "training": self._training_facts(),
            "looks": self.look_version,
            "disk": self._disk_facts(),
        }
        return _json_ready(facts)

    def _camera_facts(self) -> dict[str, Any]:
        camera = self.camera
        info = camera.info
        facts: dict[str, Any] = {"state": camera.state, "problem": camera.problem, "live": camera.live}
        if info is None:
            return facts
        exposure = camera.exposure
        return facts | {
            "model": f"{info.make} {info.model}".strip(),
            "kind": info.capabilities.focus,
            "unit": info.capabilities.focus_unit,
            "position": camera.position,
            "position_m": distance_m(camera.position, info, self._optic()),
            "scale": scale_facts(camera.limits, info, self._optic()),
            "exposure": None if exposure is None else vars(exposure),
            "exposure_note": camera.exposure_note,
            "battery": camera.battery,
            "battery_low": camera.battery is not None and _is_low(camera.battery),
        }

    @property
    def wishes(self) -> Wishes:
        return self.folder.record.wishes

    def _mark_facts(self, position: float | None) -> dict[str, Any] | None:
        if position is None or self.camera.info is None:
            return None
        return {"position": position, "m": distance_m(position, self.camera.info, self._optic())}

    def _plan_facts(self) -> dict[str, Any]:
        assert self.camera.info is not None
        key = (self.wishes, self.camera.info, self.camera.image_shape, self.camera.seconds_per_frame)
        if self._plan_cache[0] != key:
            facts = plan_facts(
                self.wishes, self.camera.info, self._optic(), self.camera.image_shape, self.camera.seconds_per_frame
            )
            self._plan_cache = (key, facts)
        return self._plan_cache[1]

    def _sweep_facts(self) -> dict[str, Any]:
        sweep = self.camera.sweep
        assert sweep is not None
        return {
            "take": sweep.take,
            "done": sweep.n_done,
            "frames": sweep.n_frames,
            "sharpness": sweep.sharpness,
            "message": sweep.message,
            "seconds": time.monotonic() - sweep.began,
        }

    def _take_facts(self, take: Take) -> dict[str, Any]:
        number = take.number
        done = self.folder.has_result(number)
        looked = ("take", number) in self.looks  # asked before the facts are read, which are there before the look
        return take.model_dump() | {
            "thumbnails": sorted(index for taken, index in list(self.camera.thumbnails) if taken == number),
            "result": done,
            "look": not done and looked,
            "failure": self.failures.get(number),
        }

    def _training_facts(self) -> dict[str, Any] | None:
        training = self.training
        if training is None:
            return None
        return {
            "state": training.state,
            "problem": training.problem,
            "takes": training.takes,
            "lines": list(training.lines)[-6:],
            "table": training.table[-12:],
            "better": training.weights is not None,
            "seconds": time.monotonic() - training.began if training.state == "running" else training.seconds,
            "held_out": self.held_out,
            "before": ("before", self.held_out) in self.looks,
            "after": ("after", self.held_out) in self.looks,
        }

    def _work_facts(self) -> dict[str, Any]:
        nothing = {"text": "", "share": None, "take": None}
        return self.at_work.get(FullJob) or self.at_work.get(LookJob) or nothing

    def _disk_facts(self) -> dict[str, Any]:
        try:
            free = shutil.disk_usage(self.folder.path).free
        except OSError as error:
            return {"free": None, "low": False, "problem": str(self.folder.unusable(error))}
        plan_bytes = self._plan_cache[1].get("bytes") if self._plan_cache[1] else None
        return {"free": free, "low": free < max(DISK_LOW_BYTES, 3 * (plan_bytes or 0)), "problem": self.folder.problem}

    # --- the connection

    async def connection(self, socket: WebSocket) -> None:
        """One page: sends state and pictures, obeys its messages."""
        await socket.accept()
        client = Client()
        self.clients.add(client)
        client.wake.set()
        sender = asyncio.create_task(self._send(socket, client))
        try:
            while True:
                received = await socket.receive()
                if received["type"] == "websocket.disconnect":
                    break
                if not self._take_message(client, received.get("text")):
                    await socket.close(1008, "too many malformed messages")
                    break
        except (WebSocketDisconnect, RuntimeError):
            pass
        finally:
            self.clients.discard(client)
            sender.cancel()
            with contextlib.suppress(asyncio.CancelledError, WebSocketDisconnect, RuntimeError, OSError):
                await sender

    def _take_message(self, client: Client, text: str | None) -> bool:
        """Validate and obey one message; False when the client has sent too much rubbish."""
        try:
            if text is None or len(text) > MAX_MESSAGE_BYTES:
                raise ValueError
            message = _message.validate_json(text)
        except ValueError as error:
            if isinstance(error, ValidationError):
                client.reply = complaint(error) or client.reply
                client.wake.set()
            client.malformed += 1
            return client.malformed <= MALFORMED_ALLOWED
        if isinstance(message, Seen):
            client.unseen = max(0, client.unseen - 1)
        else:
            client.reply = self.obey(message) or client.reply
        client.wake.set()
        return True

    async def _send(self, socket: WebSocket, client: Client) -> None:
        while True:
            await client.wake.wait()
            client.wake.clear()
            if client.reply is not None:
                reply, client.reply = client.reply, None
                await socket.send_text(json.dumps({"reply": reply}))
            if client.version != self.version:
                client.version = self.version
                await socket.send_text(json.dumps(self.state()))
                await asyncio.sleep(STATE_PERIOD_S)  # what changes meanwhile goes out together
                client.wake.set()
            serial, jpeg = self.picture
            due = time.monotonic() - client.sent_s > len(self.clients) / SENDS_PER_S
            if serial != client.picture and client.unseen < 2 and due and jpeg:
                client.picture, client.sent_s = serial, time.monotonic()
                client.unseen += 1
                await socket.send_bytes(jpeg)

    # --- pictures and files by HTTP

    async def page(self, request: Request) -> Response:
        return HTMLResponse(resources.files("reconstruct").joinpath("pages/session.html").read_text(encoding="utf-8"))

    async def frame(self, request: Request) -> Response:
        key = request.path_params["take"], request.path_params["index"]
        jpeg = await _soon(lambda: self.camera.thumbnails.get(key))
        return web.not_found() if jpeg is None else Response(jpeg, media_type="image/jpeg")

    async def look(self, request: Request) -> Response:
        found = self.looks.get((request.path_params["purpose"], request.path_params["take"]))
        name = {"depth": "depth_jpeg", "aif": "aif_jpeg"}.get(request.path_params["what"])
        if found is None or name is None:
            return web.not_found()
        return Response(getattr(found, name), media_type="image/jpeg")

    async def result_file(self, request: Request) -> Response:
        path = await _soon(lambda: web.file_below(self.folder.results, request.path_params["path"]))
        if path is None:
            return web.not_found()
        # a report is complete in itself; the policy in its own head is stricter than the server's
        policy = {"Content-Security-Policy": "frame-ancestors 'self'"} if path.suffix == ".html" else None
        return FileResponse(path, headers=policy)


async def _soon(find: Callable[[], Found | None]) -> Found | None:
    """What `find` finds, within half a second: a result is renamed into place while the page already asks for it."""
    for _ in range(10):
        found = find()
        if found is not None:
            return found
        await asyncio.sleep(0.05)
    return None


class _TakeNumber(IntegerConvertor):
    """A take or a frame in an address, of as many digits as a number may have."""

    regex = "[0-9]{1,7}"


register_url_convertor("number", _TakeNumber())


def session_app(session: Session) -> Starlette:
    """The application, without its guard."""
    return Starlette(
        routes=[
            Route("/", session.page),
            WebSocketRoute("/live", session.connection),
            Route("/frames/{take:number}/{index:number}.jpg", session.frame),
            Route("/looks/{purpose}/{take:number}/{what}.jpg", session.look),
            Route("/results/{path:path}", session.result_file),
        ],
        lifespan=session.running,
    )


def run(
    camera_uri: str,
    out: Path,
    *,
    lens: str | None,
    method: str,
    weights: str = "default",
    refine_steps: int = 0,
    device: str = "auto",
    manual_focus: bool = False,
    options: SweepOptions | None = None,
    train_steps: int | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
    browser: bool = True,
) -> None:
    """Serve a session until interrupted. Raises UsageError, DataError or LockedError before it starts."""
    if device != "auto":  # only then: the page is up seconds earlier without torch in this process
        from reconstruct.device import pick_device

        pick_device(device)
    if weights != "default":  # likewise; the first take is too late to hear of a missing file
        from reconstruct.checkpoint import load_weights

        load_weights(weights)
    optic = read_lens(lens) if lens else None
    if method not in ("network", "plane-sweep"):
        raise UsageError(f"--method is {method!r}; it must be network or plane-sweep")
    camera = open_camera(camera_uri, manual_focus=manual_focus)
    folder = SessionFolder(out, camera_uri)
    session = Session(
        folder,
        camera,
        optic=optic,
        lens_file=Path(lens) if isinstance(optic, LensProfile) and lens else None,
        method=method,
        weights=weights,
        refine_steps=refine_steps,
        device=device,
        options=options,
        train_steps=train_steps,
    )

    def ready(url: str) -> None:
        print(f"open {url}   (Ctrl-C ends the session)", flush=True)
        if browser:
            webbrowser.open(url)

    with contextlib.closing(folder):
        web.serve(session_app(session), host, port, ready)


def _is_low(battery: str) -> bool:
    """Whether a camera's words for its battery ("15%", "Low") mean that it may not last a sweep."""
    share = re.search(r"(\d+) ?%", battery)
    return int(share[1]) <= BATTERY_LOW_PERCENT if share else battery.strip().lower() in ("low", "empty", "exhausted")


def _json_ready(value: Any) -> Any:
    """`value` for JSON: infinity as the text "inf", NaN as null."""
    if isinstance(value, dict):
        return {key: _json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_ready(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "inf"
    return value
