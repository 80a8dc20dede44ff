"""`daif view OUT`: the finished reconstructions of a folder in the browser, one beside another.

Every report is a page of its own (maps side by side, refocus, measure, 3-D points, all in WebGL: no viewer library);
this adds the list and a wipe between two results in the same colours.
"""

from __future__ import annotations

import base64
import json
import os
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from capture.errors import DataError, UsageError
from reconstruct import export, report, result, web


def viewer_app(out: Path, first: str | None = None) -> Starlette:
    """The application, without its guard, over the results that are in `out` at the time of each request.

    `first` is the name of the result that the page opens with; None leaves it to the page.
    """
    told: set[str] = set()

    async def page(request: Request) -> Response:
        return HTMLResponse(resources.files("reconstruct").joinpath("pages/view.html").read_text(encoding="utf-8"))

    async def listing(request: Request) -> Response:
        entries, problems = summaries(out)
        for problem in problems:
            if problem not in told:
                print(f"daif: {problem}", file=sys.stderr, flush=True)
        told.update(problems)
        return JSONResponse([entry | {"first": entry["name"] == first} for entry in entries])

    async def one_file(request: Request) -> Response:
        name, _, inside = request.path_params["path"].partition("/")
        path = web.file_below(out / name, inside) if name not in ("", ".", "..") and _is_finished(out / name) else None
        if path is None:
            return web.not_found()
        # a report is complete in itself; the policy in its own head is stricter than the server's
        policy = {"Content-Security-Policy": "frame-ancestors 'self'"} if path.suffix == ".html" else None
        return FileResponse(path, headers=policy)

    async def pair(request: Request) -> Response:
        folders = {folder.name: folder for folder in finished(out)}
        wanted = [folders.get(request.query_params.get(side, "")) for side in ("left", "right")]
        what = request.query_params.get("what")
        if wanted[0] is None or wanted[1] is None or what not in ("depth", "aif", "confidence"):
            return web.not_found("there is no such pair")
        try:
            return JSONResponse(await run_in_threadpool(compare, wanted[0], wanted[1], what))
        except DataError as error:
            return web.not_found(str(error))

    return Starlette(
        routes=[
            Route("/", page),
            Route("/results.json", listing),
            Route("/pair.json", pair),
            Route("/results/{path:path}", one_file),
        ]
    )


def finished(out: Path) -> list[Path]:
    """Complete reconstructions in `out`, by name; none where `out` cannot be read."""
    try:
        return sorted(folder for folder in out.iterdir() if _is_finished(folder))
    except OSError:
        return []


def _is_finished(folder: Path) -> bool:
    try:
        return result.is_complete(folder)
    except OSError:  # no leave to look into it, or a name longer than names can be
        return False


def summaries(out: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """What the page lists of every result in `out`, and a sentence on every folder that it has to leave out."""
    entries, problems = [], []
    for folder in finished(out):
        try:
            entries.append(_summary(folder))
        except DataError as error:
            problems.append(str(error))
    return entries, problems


def compare(left: Path, right: Path, what: str) -> dict[str, str]:
    """Two results as pictures in the same colours (data URLs), and one line on what these mean.

    `what` is depth, aif or confidence. Raises DataError if a result is damaged.
    """
    results = [result.load(left), result.load(right)]
    if what == "aif":
        return _pictures([one.aif_srgb8 for one in results], "all-in-focus images")
    if what == "confidence":
        return _pictures([export.colorize(one.confidence, 0, 1) for one in results], "blue 0 (a guess) to red 1 (sure)")
    if not all(one.metric for one in results):
        own = [export.colorize_inverse_depth(one.inverse_depth_dpt)[0] for one in results]
        return _pictures(own, "each in its own colours: a relative depth has no metres to compare")
    both = np.concatenate([one.inverse_depth_dpt.ravel() for one in results])
    low, high = (float(q) for q in np.nanpercentile(both, [1, 99]))
    words = f"red {report.format_length(1 / max(high, 1e-3))} to blue {report.format_length(1 / max(low, 1e-3))}"
    if results[0].depth.shape == results[1].depth.shape:
        gap_m = float(np.nanmedian(np.abs(results[0].depth - results[1].depth)))
        words += f"; median difference {report.format_length(gap_m)}"
    return _pictures([export.colorize(one.inverse_depth_dpt, low, high) for one in results], words)


def _pictures(images: list[NDArray[np.uint8]], words: str) -> dict[str, str]:
    urls = [
        "data:image/png;base64," + base64.b64encode(cv2.imencode(".png", image[..., ::-1])[1].tobytes()).decode("ascii")
        for image in images
    ]
    return {"left": urls[0], "right": urls[1], "words": words}


def _summary(folder: Path) -> dict[str, Any]:
    """Raises DataError where the page could not show it."""
    try:
        folder.name.encode()
    except UnicodeEncodeError:
        name = os.fsencode(folder.name)
        raise DataError(f"{folder.parent}/ has {name!r}, left out: its name is not UTF-8; rename it") from None
    try:
        record = json.loads((folder / result.RECORD).read_text(encoding="utf-8"))
        summary = {
            "name": folder.name,
            "metric": bool(record["metric"]),
            "method": record["method"]["name"],
            "frames": len(record["optics"]["focus_dpt"]),
        }
        json.dumps(summary, ensure_ascii=False, allow_nan=False).encode()  # as it is sent
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(
            f"{folder} is left out: its {result.RECORD} is not the record of a reconstruction ({reason}); "
            "reconstruct the stack again, or move the folder away"
        ) from None
    return summary


def run(out: Path, host: str, port: int) -> None:
    """Serve `out` until interrupted; prints the one URL to open. Raises UsageError or DataError."""
    if not out.is_dir():
        raise UsageError(f"{out} is not a folder; give the one that `daif reconstruct -o` wrote")
    folder = out.resolve()
    one = folder if result.is_complete(folder) else None
    root = folder if one is None else folder.parent
    if one is not None:
        _summary(one)
    entries, problems = summaries(root)
    if not entries:
        reason = problems[0] if problems else f"run `daif reconstruct ... -o {out}` first"
        raise DataError(f"{out} holds no finished reconstruction; {reason}")
    app = viewer_app(root, None if one is None else one.name)
    web.serve(app, host, port, lambda url: print(f"open {url}   (Ctrl-C ends it)", flush=True))
