"""`daif view OUT`: the finished reconstructions of a folder in the browser, one beside another.

Every report is a page of its own (refocus, measure, 3-D); this adds the list and a wipe between two results.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from capture.errors import DataError, UsageError
from reconstruct import result, web


def viewer_app(out: Path) -> Starlette:
    """The application, without its guard, over the results that are in `out` at the time of each request."""

    async def page(request: Request) -> Response:
        return HTMLResponse(resources.files("reconstruct").joinpath("pages/view.html").read_text(encoding="utf-8"))

    async def listing(request: Request) -> Response:
        return JSONResponse([_summary(folder) for folder in finished(out)])

    async def one_file(request: Request) -> Response:
        path = web.file_below(out, request.path_params["path"])
        if path is None:
            return web.not_found()
        # a report is complete in itself; the policy in its own head is stricter than the server's
        policy = {"Content-Security-Policy": "frame-ancestors 'self'"} if path.suffix == ".html" else None
        return FileResponse(path, headers=policy)

    return Starlette(
        routes=[Route("/", page), Route("/results.json", listing), Route("/results/{path:path}", one_file)]
    )


def finished(out: Path) -> list[Path]:
    """Complete reconstructions in `out`, by name; `out` itself may be one."""
    if result.is_complete(out):
        return [out]
    return sorted(folder for folder in out.iterdir() if folder.is_dir() and result.is_complete(folder))


def _summary(folder: Path) -> dict[str, object]:
    record = json.loads((folder / result.RECORD).read_text(encoding="utf-8"))
    return {
        "name": folder.name,
        "metric": record["metric"],
        "method": record["method"]["name"],
        "frames": len(record["optics"]["focus_dpt"]),
        "seconds": record["summary"]["seconds"],
    }


def run(out: Path, host: str, port: int) -> None:
    """Serve `out` until interrupted; prints the one URL to open. Raises UsageError or DataError."""
    if not out.is_dir():
        raise UsageError(f"{out} is not a folder; give the one that `daif reconstruct -o` wrote")
    root = out.parent if result.is_complete(out) else out
    if not finished(root):
        raise DataError(f"{out} holds no finished reconstruction; run `daif reconstruct ... -o {out}` first")
    web.serve(viewer_app(root), host, port, lambda url: print(f"open {url}   (Ctrl-C ends it)", flush=True))
