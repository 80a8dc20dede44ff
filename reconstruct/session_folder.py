"""The folder of a session: takes, results, notes and a log; opening it again continues where it ended.

DIR/session.json        everything below in one file, written whole or not at all
DIR/session.log         what happened when, one line each
DIR/takes/001.h5        stacks (001.h5.partial while a sweep is unfinished)
DIR/results/001/        what `daif reconstruct` writes
DIR/training/01/        fine-tuning runs
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from capture.errors import DaifError, DataError, NoSpaceError, UsageError
from capture.lease import Lease
from capture.output import disk_is_full
from capture.stack import FocalStack, partial_path
from reconstruct import result
from reconstruct.session_plan import Wishes

Status = Literal["capturing", "unfinished", "complete"]


class Take(BaseModel):
    """One sweep of the session."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    number: int = Field(ge=1)
    status: Status
    started: str
    planned: int = Field(ge=0)
    frames: int = Field(default=0, ge=0)
    seconds: float = 0.0
    note: str = ""
    warnings: list[str] = []
    problem: str = ""
    facts: dict[str, Any] | None = None  # of the depth that is shown


class SessionRecord(BaseModel):
    """What `session.json` holds; `weights` are those accepted after fine-tuning, relative to the folder."""

    model_config = ConfigDict(extra="forbid")

    format: Literal["daif-session/1"] = "daif-session/1"
    created: str
    camera: str
    weights: str | None = None
    wishes: Wishes = Wishes()
    takes: list[Take] = []


class SessionFolder:
    """The session in `path`, held by this process alone; safe to use from several threads.

    A disk that fills up or is unplugged later does not end it: it goes on in memory, and `problem` is a sentence on
    what is not on disk.

    Raises UsageError if `path` cannot be written, LockedError if another process has it open, DataError if its
    `session.json` is damaged.
    """

    def __init__(self, path: Path, camera: str) -> None:
        self.path = path
        self.lock = threading.RLock()
        self.problem: str | None = None
        try:
            for name in ("takes", "results", "training"):
                (path / name).mkdir(parents=True, exist_ok=True)
            self._lease = Lease(self._file)
            try:
                self.record = self._read(camera)
                self._look_at_takes()
                self._write()
            except BaseException:
                self._lease.release()
                raise
        except OSError as error:
            raise UsageError(
                f"{path} cannot be used as the session's folder ({error.strerror}); choose another -o"
            ) from None

    def close(self) -> None:
        with contextlib.suppress(OSError):  # the lock falls with the process
            self._lease.release()

    def unusable(self, error: OSError) -> DaifError:
        """The one sentence about a disk that takes no more, or is there no more."""
        if disk_is_full(error):
            return NoSpaceError(f"the disk of {self.path} is full; free some space and try again")
        return UsageError(f"{self.path} cannot be used ({error.strerror}); see to its disk and try again")

    @property
    def _file(self) -> Path:
        return self.path / "session.json"

    @property
    def results(self) -> Path:
        return self.path / "results"

    @property
    def weights(self) -> Path | None:
        """The network's weights that were accepted on site."""
        return None if self.record.weights is None else self.path / self.record.weights

    def stack(self, number: int) -> Path:
        """Where take `number` is, or will be."""
        return self.path / "takes" / f"{number:03d}.h5"

    def result(self, number: int) -> Path:
        return self.results / f"{number:03d}"

    def has_result(self, number: int) -> bool:
        return result.is_complete(self.result(number))

    def stored(self, number: int) -> Path:
        """The stack of take `number`; DataError if it is not there, as when it was moved to an archive."""
        stack = self.stack(number)
        if not stack.exists():
            raise DataError(f"take {number}: its stack is not at {stack}; put it back there and try again")
        return stack

    def take(self, number: int) -> Take | None:
        return next((take for take in self.record.takes if take.number == number), None)

    def begin(self, planned: int) -> Take:
        """A new take with the next number; one of which only the stack or the result is left here keeps its own."""
        with self.lock:
            try:
                files = [file for name in ("takes", "results") for file in (self.path / name).iterdir()]
            except OSError as error:
                raise self.unusable(error) from None
            used = {take.number for take in self.record.takes} | {number_of(file) or 0 for file in files}
            take = Take(number=1 + max(used, default=0), status="capturing", started=_now(), planned=planned)
            self.record.takes.append(take)
            self.save()
            return take

    def update(self, number: int, **changes: object) -> None:
        """Change fields of a take and save."""
        with self.lock:
            take = self.take(number)
            if take is not None:
                for name, value in changes.items():
                    setattr(take, name, value)
                self.save()

    def drop(self, number: int) -> None:
        """Forget a take of which nothing was stored."""
        with self.lock:
            self.record.takes = [take for take in self.record.takes if take.number != number]
            self.save()

    def wish(self, **changes: float | None) -> None:
        """Change marks, frame count or f-number and save."""
        with self.lock:
            self.record.wishes = self.record.wishes.changed(**changes)
            self.save()

    def accept_weights(self, weights: Path) -> None:
        with self.lock:
            self.record.weights = str(weights.relative_to(self.path))
            self.save()

    def new_training(self) -> Path:
        """A folder that does not exist yet for a training run."""
        used = [int(p.name) for p in (self.path / "training").iterdir() if p.name.isdecimal()]
        return self.path / "training" / f"{1 + max(used, default=0):02d}"

    def save(self) -> None:
        """Write `session.json`; where that fails, `problem` says so, and the next change tries again."""
        with self.lock:
            try:
                self._write()
                self.problem = None
            except OSError as error:
                self.problem = (
                    f"{self._file} cannot be written ({error.strerror}); see to its disk, then change a note or mark, "
                    "which writes everything"
                )

    def _write(self) -> None:
        """`session.json`, whole or not at all."""
        partial = self._file.with_name(".session.json.partial")
        with partial.open("w", encoding="utf-8") as file:
            file.write(self.record.model_dump_json(indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self._file)

    def log(self, sentence: str) -> None:
        """Add a line to `session.log`, if it takes one: no sweep ends for want of a line."""
        with contextlib.suppress(OSError), self.lock, (self.path / "session.log").open("a", encoding="utf-8") as file:
            file.write(f"{_now()} {sentence}\n")

    def _read(self, camera: str) -> SessionRecord:
        if not self._file.exists():
            return SessionRecord(created=_now(), camera=camera)
        try:
            record = SessionRecord.model_validate_json(self._file.read_bytes())
        except OSError as error:
            raise DataError(
                f"{self._file}: cannot be read ({error.strerror}); move it away (takes and results stay)"
            ) from None
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise DataError(
                f"{self._file}: {where}: {first['msg']}; repair it, or move it away (takes and results stay)"
            ) from None
        if record.camera != camera:
            record.camera, record.wishes = camera, Wishes()  # marks count in the other camera's unit
        return record

    def _look_at_takes(self) -> None:
        """Make the record agree with the files: a killed session leaves takes that it could not write down."""
        for take in list(self.record.takes):
            self._judge(take)
        known = {take.number for take in self.record.takes}
        for file in sorted((self.path / "takes").glob("*.h5*")):
            number = number_of(file)
            if number is not None and number not in known:
                known.add(number)
                take = Take(number=number, status="unfinished", started=_now(), planned=0)
                self.record.takes.append(take)
                self._judge(take)
        self.record.takes.sort(key=lambda take: take.number)

    def _judge(self, take: Take) -> None:
        path = self.stack(take.number)
        file = path if path.exists() else partial_path(path)
        if not file.exists():
            if self.has_result(take.number):  # the stack is in an archive, what it gave is still here
                take.status = "complete"
            else:
                self.record.takes.remove(take)
            return
        try:
            with FocalStack.open(file, allow_partial=True) as stack:
                take.frames, take.planned = stack.n_frames, stack.n_planned
                take.status = "complete" if stack.complete else "unfinished"
        except DataError as error:
            take.status, take.problem = "unfinished", str(error)


def number_of(file: Path) -> int | None:
    """The take that `file` in takes/ or results/ belongs to by its name, 001.h5 or 001; None for anything else."""
    found = re.fullmatch(r"([0-9]{3,6})(\.h5(\.partial)?)?", file.name)
    return int(found[1]) or None if found else None


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S")
