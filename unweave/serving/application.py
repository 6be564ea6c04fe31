"""The web application: the page's files, the folder's report, and a JSON API."""

from __future__ import annotations

import asyncio
import json
import logging
from importlib import resources
from pathlib import Path
from typing import Any

from unweave import __version__
from unweave.data import TokenData
from unweave.errors import MissingExtraError, StorageError, UnweaveError
from unweave.files import decode_json
from unweave.report import render_report
from unweave.serving.description import describe_api
from unweave.serving.question import LIMITS, read_question
from unweave.serving.session import BusyError, Session, open_graph

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, Response
    from starlette.routing import Route

    from unweave.serving.guard import HEADERS, Guard, is_loopback
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] not in ("starlette", "uvicorn"):
        raise
    raise MissingExtraError(str(error.name), "serve", "unweave serve") from error

__all__ = ["make_app", "serve"]

log = logging.getLogger("unweave.serving")
SLOWEST_BODY_S = 10.0
MOST_CONNECTIONS = 64
TYPES = {".js": "text/javascript", ".css": "text/css", ".html": "text/html"}
# the folder's files that the text page shares with the report
SHARED = ("dom.js", "format.js", "tip.js", "style.css")


def make_app(
    folder: str | Path,
    other: str | Path | None = None,
    *,
    tokenizer: Any = None,
    data: TokenData | None = None,
    names: tuple[str, ...] = (),
) -> Starlette:
    """The application that serves a graph folder.

    Args:
        folder: a graph folder, or a model.
        other: a second one, to run the same texts through.
        tokenizer: of the model; without one, texts are token ids separated by spaces.
        data: example texts, over which the means of ablated nodes are taken; without, over each text itself.
        names: host names under which it answers, beside localhost and addresses.

    Raises:
        StorageError: no such folder.
        InputError: a graph reads no tokens, or the two have different vocabularies.

    Cost:
        Two passes over ``data``.

    Example:
        >>> from starlette.testclient import TestClient
        >>> client = TestClient(make_app("zoo:induction"), base_url="http://localhost")
        >>> answer = client.post("/api/run", json={"tokens": [0, 7, 3, 9, 7], "ablate": ["blocks.1.attn.head.0"]})
        >>> len(answer.json()["tokens"])
        5
    """
    sources = [folder] if other is None else [folder, other]
    session = Session([open_graph(source, data) for source in sources], tokenizer, data)
    app = Starlette(
        routes=[*_pages(session), *_api(session)],
        middleware=[Middleware(Guard, names=names)],
        exception_handlers={HTTPException: _refused, UnweaveError: _unusable, Exception: _broken},
    )
    app.state.session = session
    return app


def serve(
    folder: str | Path,
    host: str = "127.0.0.1",
    port: int = 8765,
    other: str | Path | None = None,
    *,
    tokenizer: Any = None,
    data: TokenData | None = None,
) -> None:
    """Serve a graph folder until interrupted; see :func:`make_app`.

    Args:
        host: what to bind to; anything but the default is reachable by others, and logs a warning.

    Raises:
        StorageError: no such folder, or the port is taken.
        InputError: see :func:`make_app`.
    """
    app = make_app(folder, other, tokenizer=tokenizer, data=data, names=(host,))
    if not is_loopback(host):
        log.warning("bound to %s: whoever can reach this machine can read the graph and use its processor", host)
    limits: dict[str, Any] = {"limit_concurrency": MOST_CONNECTIONS, "timeout_keep_alive": 5}
    config = uvicorn.Config(app, host, port, log_level="warning", server_header=False, access_log=False, **limits)
    try:
        uvicorn.Server(config).run()
    except SystemExit as error:  # how uvicorn says that it cannot bind
        raise StorageError(f"cannot listen on {host}:{port}; choose another --port or --host") from error


# ---- pages ----------------------------------------------------------------------------------------------


def _pages(session: Session) -> list[Route]:
    """The page's files, known by name beforehand: nothing in a request is ever used as a path."""
    viewer = resources.files("unweave") / "viewer"
    files = {f"/viewer/{name}": viewer / name for name in SHARED}
    files |= {f"/viewer/text/{entry.name}": entry for entry in (viewer / "text").iterdir() if entry.is_file()}
    routes = [_file("/", viewer / "text" / "index.html")]
    routes += [_file(path, entry) for path, entry in files.items() if not path.endswith(".html")]
    return routes + [Route(f"/report/{k}", _report(s.results)) for k, s in enumerate(session.served)]


def _file(path: str, entry: Any) -> Route:
    content, kind = entry.read_bytes(), TYPES["." + entry.name.rpartition(".")[2]]

    async def answer(request: Request) -> Response:
        return Response(content, media_type=kind)

    return Route(path, answer)


def _report(results: Any) -> Any:
    page = None if results is None else render_report(results)

    async def answer(request: Request) -> Response:
        if page is None:
            raise HTTPException(404, "this graph has no results; make it with 'unweave decompile'")
        # the page states its own policy, by the hashes of the script and the style inside it
        return HTMLResponse(page, headers={"content-security-policy": "frame-ancestors 'none'"})

    return answer


# ---- the API --------------------------------------------------------------------------------------------


def _api(session: Session) -> list[Route]:
    facts, texts, description = session.facts(), {"texts": session.texts()}, describe_api(__version__)

    async def run(request: Request) -> Response:
        question = read_question(await _body(request))
        return _json(await run_in_threadpool(session.answer, question))

    def constant(value: dict[str, Any]) -> Any:
        async def answer(request: Request) -> Response:
            return _json(value)

        return answer

    return [
        Route("/api/graph", constant(facts)),
        Route("/api/texts", constant(texts)),
        Route("/api/openapi.json", constant(description)),
        Route("/api/run", run, methods=["POST"]),
    ]


def _json(value: dict[str, Any], status: int = 200, headers: Any = None) -> Response:
    # in ASCII: token strings may hold half a surrogate pair, which UTF-8 cannot
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Response(text, status, headers, "application/json")


async def _body(request: Request) -> Any:
    """The request's JSON, read no further than the limit.

    A type that a form cannot have is asked for, so that a stranger's page would need leave it does not get.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "send the request as application/json")
    content = bytearray()

    async def read() -> None:
        async for chunk in request.stream():
            content.extend(chunk)
            if len(content) > LIMITS["body_bytes"]:
                raise HTTPException(413, f"the request is larger than {LIMITS['body_bytes']} bytes")

    try:
        await asyncio.wait_for(read(), SLOWEST_BODY_S)
    except TimeoutError:
        raise HTTPException(408, "the request came too slowly") from None
    try:
        return decode_json(bytes(content), "the request")
    except StorageError as error:
        raise HTTPException(400, str(error)) from error


# ---- refusals -------------------------------------------------------------------------------------------


def _error(message: str, status: int, headers: Any = None) -> Response:
    return _json({"error": message}, status, headers)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _error(str(error.detail), error.status_code, error.headers)


async def _unusable(request: Request, error: Exception) -> Response:
    if isinstance(error, BusyError):
        return _error(str(error), 503, {"retry-after": "30"})
    return _error(str(error), 422)


async def _broken(request: Request, error: Exception) -> Response:
    log.error("while answering %s", request.url.path, exc_info=error)
    # the only answer that does not pass the guard again
    return _error("something went wrong here; the server's terminal says what", 500, HEADERS)
