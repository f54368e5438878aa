"""What stands behind a gateway in the quick tests: an HTTPS server that says what reached it. Run as a program."""

from __future__ import annotations

import json
import sys

import uvicorn
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

SEEN: list[dict[str, object]] = []


async def app(scope, receive, send) -> None:
    """Every path answers; `/v1/fleet/seen` lists what came, `/v1/fleet/big` sends 30 MB."""
    if scope["type"] != "http":
        return
    request = Request(scope, receive)
    if request.url.path == "/v1/fleet/seen":
        answer = Response(json.dumps(SEEN), media_type="application/json")
    elif request.url.path == "/v1/fleet/big":
        answer = StreamingResponse((b"x" * 1_000_000 for _ in range(30)), media_type="application/octet-stream")
    else:
        size = 0
        seen = {"method": request.method, "path": scope["raw_path"].decode(), "headers": dict(request.headers)}
        SEEN.append(seen)
        async for chunk in request.stream():
            size += len(chunk)
            seen["size"] = size
        answer = Response(str(size), headers={"server": "secret-name", "connection": "x-gone"})
    await answer(scope, receive, send)


if __name__ == "__main__":
    port, certificate, key = sys.argv[1:]
    uvicorn.run(app, host="127.0.0.1", port=int(port), ssl_certfile=certificate, ssl_keyfile=key, server_header=False)
