"""Guarded YAML to frozen pydantic models; what is wrong is said with file, line and key.

PyYAML's pure-Python parser only makes events here; values are built by this file. Each guard answers an input
that broke a plain loader (notes/ecosystem.md 4.3): size and depth caps, no aliases, no explicit tags, no duplicate
keys, `1e-4` is a number, `no` and `12:30:45` stay text, and every failure is one UsageError.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from capture.errors import UsageError

Model = TypeVar("Model", bound=BaseModel)
Place = tuple[str | int, ...]

MAX_BYTES = 1 << 20
MAX_DEPTH = 64
MAX_NUMBER_CHARACTERS = 64  # longer digit strings are no measurement, and Python refuses to convert them

_NULL = {"", "~", "null", "Null", "NULL"}
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?(0|[1-9][0-9_]*)\Z")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z")
_SPECIAL = {".nan": float("nan"), ".inf": float("inf"), "+.inf": float("inf"), "-.inf": float("-inf")}


def load_yaml(path: str | Path, model: type[Model]) -> Model:
    """The file at `path` as a checked `model`.

    Raises:
        UsageError: `file:line: path.to.key: what is wrong; did you mean 'x'?`
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist; check the name") from None
    except IsADirectoryError:
        raise UsageError(f"{path} is a folder, a YAML file was expected") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    return parse_yaml(content, model, source=str(path))


def parse_yaml(content: str | bytes, model: type[Model], *, source: str) -> Model:
    """YAML text as a checked `model`; `source` names it in errors.

    Raises:
        UsageError: as `load_yaml`.
    """
    value, lines = _parse(content, source)
    if not isinstance(value, dict):
        found = "nothing" if value is None else f"{type(value).__name__} {value!r:.40}"
        raise UsageError(f"{source}: expected keys and values (`key: value` lines), found {found}")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise UsageError(_describe(error, value, lines, model, source)) from None


def did_you_mean(word: str, known: typing.Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest of `known`, else the list of them."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known are {', '.join(names)}" if names else ""


# --- text to values


def _parse(content: str | bytes, source: str) -> tuple[Any, dict[Place, int]]:
    """(plain values, line of every key and item) of YAML text."""
    if len(content) > MAX_BYTES:
        raise UsageError(f"{source}: larger than {MAX_BYTES} bytes; no configuration is that long")
    lines: dict[Place, int] = {}
    try:
        events = yaml.parse(content, Loader=yaml.SafeLoader)
        reader = _Reader(events, lines, source)
        return reader.document(), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise UsageError(f"{source}{line}: not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None
    except UnicodeError as error:
        raise UsageError(f"{source}: not UTF-8 text: {error}") from None
    except (ValueError, OverflowError) as error:  # PyYAML's scanner lets these out, e.g. chr() of a huge escape
        raise UsageError(f"{source}: not valid YAML: {error}") from None


class _Reader:
    """Builds plain values from parser events, depth first."""

    def __init__(self, events: Iterator[Any], lines: dict[Place, int], source: str) -> None:
        self.events, self.lines, self.source = events, lines, source

    def document(self) -> Any:
        value = None
        for event in self.events:
            if isinstance(event, yaml.DocumentStartEvent):
                break
        else:
            return None
        value = self.node(next(self.events), ())
        next(self.events)  # DocumentEnd
        extra = next(self.events)
        if isinstance(extra, yaml.DocumentStartEvent):
            raise self.error(extra, (), "a second YAML document starts here; one is expected")
        return value

    def node(self, event: Any, place: Place) -> Any:
        self.lines.setdefault(place, event.start_mark.line + 1)
        if len(place) > MAX_DEPTH:
            raise self.error(event, place[:4], f"nested more than {MAX_DEPTH} levels deep")
        if isinstance(event, yaml.AliasEvent):
            raise self.error(event, place, f"aliases (*{event.anchor}) are not allowed; write the value out")
        if event.tag is not None and event.tag != "!":
            raise self.error(event, place, f"tags ({event.tag}) are not allowed; remove it")
        if isinstance(event, yaml.MappingStartEvent):
            return self.mapping(place)
        if isinstance(event, yaml.SequenceStartEvent):
            return self.sequence(place)
        return self.scalar(event, place)

    def mapping(self, place: Place) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            if not isinstance(event, yaml.ScalarEvent):
                raise self.error(event, place, "a key must be plain text")
            key = event.value
            if key in found:
                first = self.lines[(*place, key)]
                raise self.error(event, (*place, key), f"duplicate key '{key}', first on line {first}; keep one")
            self.lines[(*place, key)] = event.start_mark.line + 1
            found[key] = self.node(next(self.events), (*place, key))
        return found

    def sequence(self, place: Place) -> list[Any]:
        found: list[Any] = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            found.append(self.node(event, (*place, len(found))))
        return found

    def scalar(self, event: Any, place: Place) -> Any:
        text = event.value
        if not event.implicit[0]:  # quoted
            return text
        if text in _NULL:
            return None
        if text in _BOOL:
            return _BOOL[text]
        if text.lower() in _SPECIAL:
            return _SPECIAL[text.lower()]
        is_int = _INT.match(text)
        if is_int or _FLOAT.match(text):
            if len(text) > MAX_NUMBER_CHARACTERS:
                raise self.error(event, place, f"a number of {len(text)} characters; {MAX_NUMBER_CHARACTERS} at most")
            return int(text.replace("_", "")) if is_int else float(text.replace("_", ""))
        return text

    def error(self, event: Any, place: Place, what: str) -> UsageError:
        return UsageError(f"{self.source}:{event.start_mark.line + 1}: {_dotted(place)}{what}")


# --- pydantic errors to one sentence


def _describe(error: ValidationError, value: Any, lines: dict[Place, int], model: type[BaseModel], source: str) -> str:
    """One sentence for the most telling of the validation errors."""
    problems = error.errors(include_url=False)
    # A misspelt key shows up as one unknown and one missing key: the unknown one helps more.
    problems.sort(key=lambda problem: problem["type"] != "extra_forbidden")
    first = problems[0]
    place = _place_in(value, first["loc"])
    line = next((lines[place[:n]] for n in range(len(place), -1, -1) if place[:n] in lines), 1)
    kind, message = first["type"], first["msg"]
    if kind == "extra_forbidden":
        where, key = place[:-1], str(place[-1])
        return f"{source}:{line}: {_dotted(where)}unknown key '{key}'{did_you_mean(key, _fields(model, where))}"
    if kind == "missing":
        where = _place_in(value, first["loc"][:-1])
        line = next((lines[where[:n]] for n in range(len(where), -1, -1) if where[:n] in lines), 1)
        what = f"'{first['loc'][-1]}' is missing"
        return f"{source}:{line}: {_dotted(where)}{what}{_more(problems)}"
    message = message.removeprefix("Value error, ")
    found = first["input"]
    if not isinstance(found, dict | list) and kind != "value_error":  # our own validators say what they found
        message += f", found {found!r:.60}"
    return f"{source}:{line}: {_dotted(place)}{message[:1].lower() + message[1:]}{_more(problems)}"


def _more(problems: list[Any]) -> str:
    return f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""


def _dotted(place: Place) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")
    return f"{text}: " if text else ""


def _place_in(value: Any, loc: tuple[str | int, ...]) -> Place:
    """`loc` without the parts that pydantic adds for union members and that are no keys of the file."""
    place: list[str | int] = []
    for part in loc:
        if isinstance(value, dict) and part in value:
            value = value[str(part)]
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            value = value[part]
        else:
            continue
        place.append(part)
    return tuple(place)


def _fields(annotation: Any, place: Place) -> set[str]:
    """Names that the models reachable at `place` below `annotation` accept."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _fields(typing.get_args(annotation)[0], place)
    if origin in (typing.Union, types.UnionType):
        return set().union(*(_fields(member, place) for member in typing.get_args(annotation)))
    if origin is not None:  # list[X], tuple[X, ...], dict[str, X]
        inner = [argument for argument in typing.get_args(annotation) if argument is not Ellipsis]
        return _fields(inner[-1], place[1:]) if inner and place else set()
    if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
        return set()
    named = {field.alias or name: field.annotation for name, field in annotation.model_fields.items()}
    if not place:
        return set(named)
    return _fields(named[str(place[0])], place[1:]) if place[0] in named else set()
