"""Routes that tell about the server: health, readiness, version, metrics, models; and the one that flushes its cache."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from l4core import __version__
from l4core.server.failures import json_response
from l4core.server.metrics import CONTENT_TYPE
from l4core.server.replies import Model, ModelList, Status, Version
from l4core.server.service import Service


async def health(service: Service, http: Request) -> Response:
    """200 while the engine process runs with a loaded model, 503 while it starts, restarts or is gone."""
    return json_response(Status(service.status), status=200 if service.healthy else 503)


async def ready(service: Service, http: Request) -> Response:
    """200 while new requests are taken: as /health, but 503 while draining (on a connection that is open; new ones are refused then)."""
    return json_response(Status(service.status), status=200 if service.healthy and not service.draining else 503)


async def version(service: Service, http: Request) -> Response:
    return json_response(Version(__version__))


async def flush_cache(service: Service, http: Request) -> Response:
    """Cached prefixes are forgotten; requests that run keep theirs. 503 while there is no engine."""
    service.bridge.flush_cache()
    return json_response(Status("flushed"))


async def metrics(service: Service, http: Request) -> Response:
    service.metrics.engines_up(service.num_ready)
    return Response(service.metrics.render(), headers={"content-type": CONTENT_TYPE})


async def models(service: Service, http: Request) -> Response:
    return json_response(ModelList(data=[_model(service)]))


async def model(service: Service, http: Request) -> Response:
    service.check_model(http.path_params["model_id"])
    return json_response(_model(service))


def _model(service: Service) -> Model:
    loaded = service.loaded
    return Model(id=service.model_name, created=loaded.created, max_model_len=loaded.context_length)
