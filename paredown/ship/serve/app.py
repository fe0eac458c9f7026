"""The routes of the endpoint: HTTP in, HTTP out, and nothing else."""

from __future__ import annotations

import asyncio
import hmac
import importlib.metadata
from collections.abc import Awaitable, Callable
from pathlib import Path

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from paredown.ship.serve import protocol, triton
from paredown.ship.serve.reading import Room, body_of
from paredown.ship.serve.refused import Refused
from paredown.ship.serve.service import ACTIONS, Service

EXTENSIONS = ["binary_tensor_data", "model_configuration", "statistics", "rollout", "feedback"]
PAGE = Path(__file__).with_name("page.html")
LARGE = 2**20  # bytes from which a body is parsed beside the event loop
MOST_CONTROL = 2**16  # bytes of a request that is no inference
POLICY = (
    "default-src 'none'; connect-src 'self'; img-src data:; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
Handler = Callable[[Request], Awaitable[Response]]


def json_response(value: object, status: int = 200) -> Response:
    text = orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(text, status, media_type=protocol.JSON)


class Endpoint:
    """The handlers of one service.

    Args:
        token: what a request must bring that changes the rollout.
    """

    def __init__(self, service: Service, token: str) -> None:
        self.service, self._token = service, token.encode()
        self._room, self._one_large = Room(), asyncio.Lock()

    # --- the protocol -----------------------------------------------------------------------------

    async def server(self, request: Request) -> Response:
        version = importlib.metadata.version("paredown")
        return json_response({"name": "paredown", "version": version, "extensions": EXTENSIONS})

    async def live(self, request: Request) -> Response:
        return json_response({"live": True})

    async def ready(self, request: Request) -> Response:
        ready = self.service.ready()
        return json_response({"ready": ready}, 200 if ready else 503)

    async def model(self, request: Request) -> Response:
        return json_response(self.service.metadata(*_named(request)))

    async def model_ready(self, request: Request) -> Response:
        name, version = _named(request)
        ready = self.service.worker(name, version).ready and not self.service.draining
        return json_response({"name": name, "ready": ready}, 200 if ready else 503)

    async def infer(self, request: Request) -> Response:
        name, version = _named(request)
        try:
            self.service.worker(name, version)
            self.service.check_room(version)
            body, taken = await body_of(request, self._room)
            try:
                asked = await self._parsed(body, request.headers.get(protocol.HEADER))
                answered_by, answer = await self.service.infer(name, version, asked)
                text, headers = protocol.answer(asked, name, answered_by, answer.outputs)
            finally:
                self._room.give(taken)
        except Refused as refused:
            if refused.status != 404:
                self.service.count("nv_inference_request_failure", version or "1")
            raise
        return Response(text, headers=headers)

    async def _parsed(self, body: bytes, header: str | None) -> protocol.Request:
        if len(body) > LARGE:
            async with self._one_large:  # its numbers take many times its room while it is parsed
                return await asyncio.to_thread(protocol.request_of, body, header)
        return protocol.request_of(body, header)

    async def metrics(self, request: Request) -> Response:
        text = self.service.metrics(await asyncio.to_thread(self.service.look))
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    # --- what Triton's clients ask besides --------------------------------------------------------

    async def config(self, request: Request) -> Response:
        worker = self.service.worker(*_named(request))
        if worker.signature is None:
            raise Refused(503, f"{worker.name} {worker.why}")
        runtime, most = worker.runtime.split(" ")[0], worker.limits.batch
        return json_response(triton.config(self.service.name, runtime, worker.signature, most))

    async def statistics(self, request: Request) -> Response:
        if "model" in request.path_params:
            self.service.worker(*_named(request))
        done = {version: each.counts.executions for version, each in self.service.workers.items()}
        return json_response(triton.statistics(self.service.name, done, self.service.counters))

    async def index(self, request: Request) -> Response:
        why = {version: worker.why for version, worker in self.service.workers.items()}
        return json_response(triton.index(self.service.name, why))

    async def no_shared_memory(self, request: Request) -> Response:
        raise Refused(501, "shared memory is not supported; send the tensors.")

    # --- beside the protocol ----------------------------------------------------------------------

    async def page(self, request: Request) -> Response:
        headers = {"content-security-policy": POLICY, "x-content-type-options": "nosniff"}
        return Response(PAGE.read_bytes(), media_type="text/html", headers=headers)

    async def status(self, request: Request) -> Response:
        told = await asyncio.to_thread(self.service.look)
        return json_response(self.service.status(told))

    async def act(self, request: Request) -> Response:
        action = request.path_params["action"]
        if action not in ACTIONS:
            raise Refused(404, f"rollout: {action[:50]!r} is not one of {', '.join(ACTIONS)}.")
        given = request.headers.get("authorization", "").encode("utf-8", "replace")
        if not hmac.compare_digest(given, b"Bearer " + self._token):
            raise Refused(401, "rollout: expected the header 'Authorization: Bearer TOKEN'.")
        said = await self._said(request)
        by = request.client.host if request.client else "http"
        told = await asyncio.to_thread(self.service.act, action, said.get("reason"), by)
        return json_response(self.service.status(told))

    async def feedback(self, request: Request) -> Response:
        said = await self._said(request)
        return json_response(await self.service.feedback(request.path_params["model"], said))

    async def _said(self, request: Request) -> dict[str, object]:
        body, taken = await body_of(request, self._room, MOST_CONTROL)
        self._room.give(taken)
        return protocol.json_of(body)


def _named(request: Request) -> tuple[str, str]:
    """Model and version of a path; "" for none."""
    return request.path_params["model"], request.path_params.get("version", "")


def made(endpoint: Endpoint) -> Starlette:
    """The application."""
    models = "/v2/models/{model}"
    get: list[tuple[str, Handler]] = [
        ("/v2/models/stats", endpoint.statistics),
        ("/", endpoint.page),
        ("/metrics", endpoint.metrics),
        ("/v2", endpoint.server),
        ("/v2/health/live", endpoint.live),
        ("/v2/health/ready", endpoint.ready),
        ("/v2/rollout", endpoint.status),
    ]
    post: list[tuple[str, Handler]] = []
    for path in (models, models + "/versions/{version}"):
        get += [(path, endpoint.model), (path + "/ready", endpoint.model_ready)]
        get += [(path + "/config", endpoint.config), (path + "/stats", endpoint.statistics)]
        post.append((path + "/infer", endpoint.infer))
    post.append(("/v2/repository/index", endpoint.index))
    for kind in ("system", "cuda"):
        get.append((f"/v2/{kind}sharedmemory/{{rest:path}}", endpoint.no_shared_memory))
        post.append((f"/v2/{kind}sharedmemory/{{rest:path}}", endpoint.no_shared_memory))
    post += [("/v2/rollout/{action}", endpoint.act), (models + "/feedback", endpoint.feedback)]
    routes = [Route(path, handler, methods=["POST"]) for path, handler in post]
    routes += [Route(path, handler, methods=["GET"]) for path, handler in get]
    app = Starlette(routes=routes, exception_handlers={Refused: _refused, HTTPException: _unknown})
    app.router.redirect_slashes = False
    app.add_exception_handler(Exception, _failed)
    return app


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    headers = {408: {"connection": "close"}, 503: {"retry-after": "1"}}.get(error.status)
    text = protocol.error(str(error))
    return Response(text, error.status, headers, media_type=protocol.JSON)


async def _unknown(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    words = {404: "no such path; see GET /v2.", 405: "this path takes another method."}
    text = protocol.error(words.get(error.status_code, "the request is not understood."))
    return Response(text, error.status_code, error.headers, media_type=protocol.JSON)


async def _failed(request: Request, error: Exception) -> Response:
    """A mistake of this program: told to its log, and not to the client."""
    text = protocol.error("the server failed on this request; its log says more.")
    return Response(text, 500, media_type=protocol.JSON)
