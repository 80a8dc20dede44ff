"""The guarded YAML loader: every input that broke a plain one (notes/ecosystem.md 4.3), answered in one sentence."""

import math

import numpy as np
import pytest
from pydantic import BaseModel, ConfigDict, Field

from capture.config import MAX_BYTES, did_you_mean, load_yaml, parse_yaml
from capture.errors import UsageError
from capture.lens import Lens


class Optimiser(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    learning_rate: float = 1e-3
    steps: int = Field(default=10, gt=0)
    nesterov: bool = False


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    train: Optimiser = Optimiser()
    name: str | None = None
    lens: Lens | str | None = None
    levels: tuple[float, ...] = ()
    stages: list[Optimiser] = []
    named: dict[str, Optimiser] = {}


class Nested(BaseModel):
    model_config = ConfigDict(extra="forbid")

    a: list[list[list[float]]] | None = None


def parse(text):
    return parse_yaml(text, Config, source="c.yaml")


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("train: {learning_rate: 1e-4}", "train.learning_rate", 1e-4),
        ("train: {learning_rate: 1E+2}", "train.learning_rate", 100.0),
        ("train: {learning_rate: .5}", "train.learning_rate", 0.5),
        ("train: {learning_rate: 3}", "train.learning_rate", 3.0),
        ("train: {steps: 1_000}", "train.steps", 1000),
        ("name: no", "name", "no"),
        ("name: 12:30:45", "name", "12:30:45"),
        ("name: 2001-01-01", "name", "2001-01-01"),
        ("name: '1e-4'", "name", "1e-4"),
        ("name: ~", "name", None),
        ("name:", "name", None),
        ("train: {nesterov: true}", "train.nesterov", True),
        ("levels: [0, -1.5, 2e3]", "levels", (0.0, -1.5, 2000.0)),
        ("levels: [.inf, -.inf]", "levels", (math.inf, -math.inf)),
        ("lens: path/lens.yaml", "lens", "path/lens.yaml"),
        ("%YAML 1.1\n---\nname: x\n...\n", "name", "x"),
    ],
)
def test_values_mean_what_they_look_like(text, path, value):
    found = parse(text)
    for part in path.split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


BAD = {
    "unknown key": (
        "train:\n  learning_rat: 3",
        "c.yaml:2: train: unknown key 'learning_rat'; did you mean 'learning_rate'?",
    ),
    "unknown at top": ("nme: x", "c.yaml:1: unknown key 'nme'; did you mean 'name'?"),
    "nothing alike": ("train: {zzz: 1}", "unknown key 'zzz'; known are learning_rate, nesterov, steps"),
    "in a list": ("stages:\n- steps: 1\n- stops: 2", "c.yaml:3: stages[1]: unknown key 'stops'; did you mean 'steps'?"),
    "in a dict": ("named:\n  a: {stops: 2}", "c.yaml:2: named.a: unknown key 'stops'; did you mean 'steps'?"),
    "in a union": (
        "lens:\n  focal_length: 0.05",
        "c.yaml:2: lens: unknown key 'focal_length'; did you mean 'focal_length_m'?",
    ),
    "missing": ("lens:\n  f_number: 2\n  focal_length_m: 0.05", "c.yaml:1: lens: 'pixel_pitch_m' is missing"),
    "millimetres": (
        "lens: {focal_length_m: 50,\n f_number: 2, pixel_pitch_m: 1e-5}",
        "c.yaml:1: lens.focal_length_m: 50 is not a focal length in metres",
    ),
    "fraction": ("train: {steps: 1.5}", "c.yaml:1: train.steps: input should be a valid integer"),
    "bound": ("train:\n  steps: 0", "c.yaml:2: train.steps: input should be greater than 0, found 0"),
    "word for number": (
        "train:\n\n  learning_rate: fast",
        "c.yaml:3: train.learning_rate: input should be a valid number",
    ),
    "duplicate": ("name: a\nname: b", "c.yaml:2: name: duplicate key 'name', first on line 1; keep one"),
    "alias": ("a: &x [1]\nb: *x", "c.yaml:2: b: aliases (*x) are not allowed"),
    "merge": ("a: &x {b: 1}\nc:\n  <<: *x", "aliases (*x) are not allowed"),
    "tag": ("name: !!python/object/apply:os.system [ls]", "c.yaml:1: name: tags (tag:yaml.org,2002:python/object"),
    "short tag": ("name: !!str 3", "tags (tag:yaml.org,2002:str) are not allowed"),
    "long number": ("train: {steps: " + "9" * 100_000 + "}", "a number of 100000 characters; 64 at most"),
    "deep": ("[" * 50_000, "nested more than 64 levels deep"),
    "deep mapping": ("\n".join(" " * i + "a:" for i in range(900)), "nested more than 64 levels deep"),
    "list": ("- 1\n- 2", "c.yaml: expected keys and values (`key: value` lines), found list"),
    "text": ("hello", "found str 'hello'"),
    "empty": ("", "found nothing"),
    "comment only": ("# x\n", "found nothing"),
    "two documents": ("name: a\n---\nname: b", "c.yaml:2: a second YAML document starts here"),
    "tab": ("train:\n\tsteps: 1", "c.yaml:2: not valid YAML: found character '\\t'"),
    "unclosed": ("name: [1, 2", "c.yaml:1: not valid YAML"),
    "colon": ("name: a: b", "c.yaml:1: not valid YAML: mapping values are not allowed here"),
    "complex key": ("? [a, b]\n: 1", "c.yaml:1: a key must be plain text"),
    "huge escape": ('name: "\\UFFFFFFFF"', "c.yaml: not valid YAML"),
    "control character": ("name: a\x00b", "not valid YAML"),
    "bytes": (b"name: \xff\xfe\xfa", "c.yaml: not valid YAML"),
    "half UTF-16": (b"\xff\xfea", "c.yaml: not valid YAML"),
    "too large": ("#" * (MAX_BYTES + 1), "c.yaml: larger than 1048576 bytes"),
    "bad directive": ("%TAG x\n--- a", "not valid YAML"),
    "undefined alias": ("name: *nope", "aliases (*nope) are not allowed"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(case):
    text, words = BAD[case]
    with pytest.raises(UsageError) as caught:
        parse(text)
    message = str(caught.value)
    assert words in message
    assert "\n" not in message
    assert len(message) < 300
    assert caught.value.exit_code == 2


def test_several_mistakes_are_counted():
    with pytest.raises(UsageError, match=r"\(and 1 more\)"):
        parse("train: {steps: x, learning_rate: y}")


def test_an_alias_bomb_costs_nothing():
    lines = ["a0: &a0 [1, 1]"] + [f"a{i}: &a{i} [" + f"*a{i - 1}, " * 9 + "]" for i in range(1, 9)]
    with pytest.raises(UsageError, match="aliases"):
        parse_yaml("\n".join(lines), Nested, source="c.yaml")


def test_files(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("name: ünï\n", encoding="utf-8")
    assert load_yaml(path, Config).name == "ünï"
    with pytest.raises(UsageError, match=r"nope\.yaml does not exist; check the name"):
        load_yaml(tmp_path / "nope.yaml", Config)
    with pytest.raises(UsageError, match="is a folder"):
        load_yaml(tmp_path, Config)
    path.write_bytes(b"#" * (MAX_BYTES + 10))
    with pytest.raises(UsageError, match="larger than"):
        load_yaml(path, Config)


def test_did_you_mean():
    assert did_you_mean("transfr", ["transfer", "frames"]) == "; did you mean 'transfer'?"
    assert did_you_mean("x", ["b", "a"]) == "; known are a, b"
    assert did_you_mean("x", []) == ""


GOOD = b"""name: shelf
train: {learning_rate: 1e-4, steps: 3}
levels: [0.1, 0.2]
stages:
  - {steps: 1, nesterov: true}
  - steps: 2
lens:
  focal_length_m: 0.05
  f_number: 2.8
  pixel_pitch_m: 1.2e-5
"""


def mutated(content, rng):
    changed = bytearray(content)
    for _ in range(rng.integers(1, 8)):
        place = rng.integers(len(changed))
        alphabet = b"{}[]:,&*!|>'\"%@`#-?\t\n\x00\xff ~0e"
        match rng.integers(3):
            case 0:
                changed[place] = alphabet[rng.integers(len(alphabet))]
            case 1:
                changed.insert(place, alphabet[rng.integers(len(alphabet))])
            case _:
                del changed[place : place + int(rng.integers(1, 6))]
        changed = changed or bytearray(b" ")
    return bytes(changed)


def check_mutations(count, seed):
    rng = np.random.default_rng(seed)
    parse_yaml(GOOD, Config, source="c.yaml")
    messages = []
    for _ in range(count):
        try:
            parse_yaml(mutated(GOOD, rng), Config, source="c.yaml")
        except UsageError as error:
            messages.append(str(error))
    assert all(message.startswith("c.yaml") and "\n" not in message for message in messages)
    return len(messages)


def test_mutated_yaml_gives_one_error_class():
    assert check_mutations(1000, seed=0) > 500


@pytest.mark.slow
def test_much_mutated_yaml_gives_one_error_class():
    check_mutations(10_000, seed=1)
