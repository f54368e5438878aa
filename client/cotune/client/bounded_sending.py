"""How a courier's requests are sent: answers are read up to a size, and a dead line is noticed in time."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import httpx
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext

from cotune.shared.errors import ConnectionFailed

SIZE = "E-MESSAGE-SIZE"
MAX_RESPONSE = 64 * 1024 * 1024  # Flower cuts arrays into parts of 5 MB; a bundle has at most 10
HEARTBEAT_TIMEOUT_S = 15.0  # few bytes; on a dead line, tried again within the lease


@dataclass(frozen=True)
class BoundedSending:
    """Sends Flower's requests by a connection of ours, which reads no more than it must."""

    http: httpx.Client

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        """Send a request; see `ProtobufClientInterceptor`.

        Raises:
            ConnectionFailed: E-MESSAGE-SIZE.
            httpx.HTTPError: The line failed.
        """
        del call_next
        context.request.headers["accept-encoding"] = "identity"
        if context.request.url.path.endswith("/send-node-heartbeat"):
            context.request.extensions["timeout"] = httpx.Timeout(HEARTBEAT_TIMEOUT_S).as_dict()
        response, content = self.http.send(context.request, stream=True), bytearray()
        with contextlib.closing(response):
            for chunk in response.iter_raw():
                content += chunk
                if len(content) > MAX_RESPONSE:
                    raise too_large()
        headers = [(key, value) for key, value in response.headers.multi_items() if key != "content-encoding"]
        return httpx.Response(response.status_code, headers=headers, content=bytes(content), request=context.request)


def too_large() -> ConnectionFailed:
    """The error for more than a site takes."""
    return ConnectionFailed(SIZE, "the message is larger than this site takes")
