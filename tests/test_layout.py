"""The house rules that a test can read."""

import ast
import gc
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED: dict[str, set[str]] = {"capture": set(), "calibration": {"capture"}, "reconstruct": {"capture", "calibration"}}
SOURCES = [path for package in ALLOWED for path in sorted((ROOT / package).rglob("*.py"))]


@pytest.fixture(scope="module", autouse=True)
def _no_garbage_of_other_tests():
    """Python 3.11's `ast.parse` fails ("recursion depth mismatch") where a Dask task's finaliser interrupts it."""
    gc.collect()


def imported_names(path: Path, *, at_import_time: bool = False) -> set[str]:
    """Top-level package names that `path` imports; with `at_import_time` only those outside functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if at_import_time and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the full name"
            found.add((node.module or "").split(".")[0])
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return found


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_point_one_way(package):
    for path in (ROOT / package).rglob("*.py"):
        used = imported_names(path) & ALLOWED.keys() - {package}
        assert used <= ALLOWED[package], f"{path} imports {sorted(used - ALLOWED[package])}"


def test_capture_needs_neither_torch_nor_a_camera_driver():
    for path in (ROOT / "capture").rglob("*.py"):
        assert "torch" not in imported_names(path), path
        drivers = imported_names(path, at_import_time=True) & {"gphoto2", "picamera2"}
        assert not drivers, f"{path} imports {drivers} at import time"


def test_only_the_stack_file_imports_h5py():
    allowed = {"capture/stack.py", "reconstruct/datasets.py"}  # the second reads other people's layouts
    users = {str(p.relative_to(ROOT)) for p in SOURCES if "h5py" in imported_names(p)}
    assert users <= allowed


FORBIDDEN = [
    r"\bpickle\.load",
    r"allow_pickle\s*=\s*True",
    r"yaml\.(load|unsafe_load|full_load)\(",
    r"(?<![\w.])eval\(",
]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_unpickles_or_evaluates(path):
    text = path.read_text(encoding="utf-8")
    for pattern in FORBIDDEN:
        assert not re.search(pattern, text), f"{path}: {pattern}"
    for call in re.findall(r"torch\.load\([^)]*\)", text):
        assert "weights_only=True" in call, f"{path}: {call}"
