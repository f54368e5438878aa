"""Flower's fleet API as a courier uses it. Nothing that comes through it is run; all of it has a bound.

TLS with the coordinator's one certificate, no redirect, no decompression, no answer beyond its size.
"""

from __future__ import annotations

import contextlib
import hashlib
import ssl
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from threading import Lock

import httpx
from flwr.app import Message, RecordDict
from flwr.app.message.message import remove_content_from_message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fab_pb2 import GetFabRequest
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectUnavailableError,
    inflate_object_from_contents,
    pull_objects,
)
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from cotune.client.bounded_sending import BoundedSending, too_large
from cotune.client.courier_folder import CourierFolder
from cotune.shared.errors import ConnectionFailed

AWAY, REFUSED, TLS, CLOCK = "E-COORDINATOR-AWAY", "E-NODE-REFUSED", "E-TLS", "E-CLOCK"
MAX_OBJECTS = 100_000
CALL_TIMEOUT_S, CONTENT_TIMEOUT_S = 120.0, 3600.0  # 5 MB over a line of 1 Mbit/s take 40 s
UNAUTHORIZED, MAX_SKEW_S = 401, 300.0


class RunOver(Exception):
    """The run of a message goes on no more, or its content is gone: nobody waits for an answer."""


@dataclass(frozen=True)
class Incoming:
    """A message that came, without its content.

    Attributes:
        raw: As Flower sent it.
        message: What is said of it.
    """

    raw: bytes
    message: Message

    @property
    def run_id(self) -> int:
        """Flower's run."""
        return self.message.metadata.run_id

    @property
    def is_expired(self) -> bool:
        """Whether an answer would come too late."""
        return self.message.metadata.created_at + self.message.metadata.ttl < time.time()


def read_incoming(raw: bytes) -> Incoming:
    """Read a message that was kept.

    Raises:
        ConnectionFailed: E-WIRE: it is none.
    """
    with _named_errors():
        return Incoming(raw, message_from_proto(PullMessagesResponse.FromString(raw).messages_list[0]))


class FleetLink:
    """A node of a coordinator's Flower.

    Every call raises ConnectionFailed with one of this module's codes, or RunOver; and may be made again.

    Args:
        folder: Key, certificate and address.
    """

    def __init__(self, folder: CourierFolder) -> None:
        settings, key = folder.settings, folder.key
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # checks host name and chain; trusts no system authority
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        with _named_errors():
            context.load_verify_locations(cadata=folder.ca.decode("ascii"))
        self.node_id = 0
        self._heartbeat_s, self._max_bytes = settings.heartbeat_s, settings.max_message_mb * 1024 * 1024
        self._public = public_key_to_bytes(key.public_key())
        self._http = httpx.Client(verify=context, follow_redirects=False, limits=httpx.Limits(keepalive_expiry=60))
        self._fleet = FleetHttpClient(
            f"https://{settings.address}",
            interceptors=[NodeAuthHttpInterceptor(key, key.public_key()), BoundedSending(self._http)],
            verify=context,
            timeout=CALL_TIMEOUT_S,
        )

    def activate(self) -> None:
        """Become the node of this key; refused while another process is, and for a minute after it died."""
        with _named_errors():
            request = ActivateNodeRequest(public_key=self._public, heartbeat_interval=self._heartbeat_s)
            self.node_id = self._fleet.ActivateNode(request).node_id

    def heartbeat(self) -> None:
        """Say that this node lives; that alone brings a node back which Flower took for gone."""
        with _named_errors():
            request = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=self._heartbeat_s)
            if self.node_id == 0 or not self._fleet.SendNodeHeartbeat(request).success:
                raise ConnectionFailed(REFUSED, "the coordinator does not know this node any more")

    def deactivate(self) -> None:
        """Say that this node goes."""
        with _named_errors():
            self._fleet.DeactivateNode(DeactivateNodeRequest(node_id=self.node_id))

    def pull(self) -> Incoming | None:
        """The next message. Flower never hands it out again: the caller keeps it before anything else."""
        with _named_errors():
            response = self._fleet.PullMessages(PullMessagesRequest(node=self._node))
            return read_incoming(response.SerializeToString()) if response.messages_list else None

    def content(self, incoming: Incoming) -> RecordDict:
        """A message's records, each part held against its hash.

        Raises:
            ConnectionFailed: Also E-MESSAGE-SIZE, E-WIRE.
        """
        with _named_errors():
            tree = PullMessagesResponse.FromString(incoming.raw).message_object_trees[0]
            wanted = list(dict.fromkeys(node.object_id for node in iterate_object_tree(tree)))
            if len(wanted) > MAX_OBJECTS or tree.object_id != incoming.message.metadata.message_id:
                raise ConnectionFailed("E-WIRE", "the message has not the parts Flower sends")
            puller = _Puller(self._fleet, self._node, incoming.run_id, self._max_bytes)
            contents = pull_objects(wanted, puller.pull, max_time=CONTENT_TIMEOUT_S)
            inflated = inflate_object_from_contents(tree.object_id, contents)
            if not isinstance(inflated, Message) or not inflated.has_content():
                raise ConnectionFailed("E-WIRE", "the message has no content")
            return inflated.content

    def bundle(self, run_id: int) -> bytes:
        """The bundle of a run, to be compared and nothing else."""
        with _named_errors():
            run = self._fleet.GetRun(GetRunRequest(node=self._node, run_id=run_id)).run
            return self._fleet.GetFab(GetFabRequest(node=self._node, hash_str=run.fab_hash, run_id=run_id)).fab.content

    def push(self, frames: Sequence[bytes]) -> None:
        """Send an answer that `packed` made; sent again, it is the same one.

        Edge cases: of one that Flower has, or wants no more, it asks for no part. They are sent all the same, under no
        session: the coordinator may be waiting for those that a courier died over.
        """
        with _named_errors():
            request = PushMessagesRequest.FromString(frames[0])
            if request.node.node_id != self.node_id:
                raise RunOver
            said, run_id = self._fleet.PushMessages(request), request.messages_list[0].metadata.run_id
            missing = set(said.objects_to_push)
            parts = {hashlib.sha256(content).hexdigest(): content for content in frames[1:]}
            for object_id in parts.keys() & missing if missing else parts:
                part = PushObjectRequest(
                    node=self._node, run_id=run_id, object_id=object_id, object_content=parts[object_id],
                    session_id=said.session_id if missing else "",
                )  # fmt: skip
                if not self._fleet.PushObject(part).stored and missing:
                    raise ConnectionFailed(AWAY, "the coordinator restarted while an answer was sent")

    def packed(self, records: RecordDict, incoming: Incoming) -> list[bytes]:
        """An answer as it is kept and sent. How long it took is not told."""
        reply = Message(records, reply_to=incoming.message)
        with no_object_id_recompute():
            reply.metadata.__dict__["_message_id"] = reply.object_id
            tree = get_object_tree(reply)
            parts = [each.deflate() for each in get_all_nested_objects(reply).values()]
        request = PushMessagesRequest(
            node=self._node,
            messages_list=[message_to_proto(remove_content_from_message(reply))],
            message_object_trees=[tree],
            clientapp_runtime_list=[0.0],
        )
        return [request.SerializeToString(deterministic=True), *parts]

    def confirm(self, incoming: Incoming) -> None:
        """Let the coordinator forget a message's content."""
        run_id, message_id = incoming.run_id, incoming.message.metadata.message_id
        request = ConfirmMessageReceivedRequest(node=self._node, run_id=run_id, message_object_id=message_id)
        with _named_errors():
            self._fleet.ConfirmMessageReceived(request)

    def close(self) -> None:
        """Close the connections."""
        self._fleet.close()
        self._http.close()

    @property
    def _node(self) -> Node:
        return Node(node_id=self.node_id)


class _Puller:
    """Fetches a message's parts, up to a size of all of them together."""

    def __init__(self, fleet: FleetHttpClient, node: Node, run_id: int, most: int) -> None:
        self._fleet, self._node, self._run_id, self._left, self._lock = fleet, node, run_id, most, Lock()

    def pull(self, object_id: str) -> bytes:
        found = self._fleet.PullObject(PullObjectRequest(node=self._node, run_id=self._run_id, object_id=object_id))
        if not found.object_found:
            raise RunOver
        if not found.object_available:
            raise ObjectUnavailableError(object_id)
        with self._lock:
            self._left -= len(found.object_content)
            if self._left < 0:
                raise too_large()
        if hashlib.sha256(found.object_content).hexdigest() != object_id:
            raise ConnectionFailed("E-WIRE", "a part of the message is not the one its hash names")
        return found.object_content


@contextlib.contextmanager
def _named_errors() -> Generator[None]:
    """Whatever the network, TLS, HTTP, Flower or a stranger's bytes break, by one of this module's names."""
    try:
        yield
    except (ConnectionFailed, RunOver):
        raise
    except httpx.HTTPStatusError as error:
        raise _by_status(error.response) from None
    except (httpx.HTTPError, OSError, ObjectPullError) as error:
        tls = isinstance(error, ssl.SSLError) or "CERTIFICATE" in str(error).upper()
        what = "its certificate is not vouched for by the coordinator's" if tls else type(error).__name__
        raise ConnectionFailed(TLS if tls else AWAY, f"the coordinator cannot be reached: {what}") from None
    except Exception as error:  # noqa: BLE001 - the bytes come from outside: whatever they break, they are no message
        raise ConnectionFailed("E-WIRE", f"Flower's answer cannot be read ({type(error).__name__})") from None


def _by_status(response: httpx.Response) -> Exception:
    said = FlowerError.from_json(response.text)
    code = said.code if said else None
    if code == ApiErrorCode.FLEET_RUN_STATUS_NOT_ALLOWED:
        return RunOver()
    if code == ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED or response.status_code == UNAUTHORIZED:
        with contextlib.suppress(KeyError, ValueError, TypeError):
            skew = time.time() - parsedate_to_datetime(response.headers["date"]).timestamp()
            if abs(skew) > MAX_SKEW_S:
                return ConnectionFailed(CLOCK, f"this machine's clock is {skew:.0f} s from the coordinator's")
        what = "the coordinator does not let this site's node key in, or another courier has its place"
        return ConnectionFailed(REFUSED, what, hint="ask the coordinator: cotune fed sites")
    if said and response.is_client_error:
        return ConnectionFailed("E-WIRE", f"the coordinator's Flower refuses the call ({said.code})")
    return ConnectionFailed(AWAY, f"the coordinator answers {response.status_code}")
