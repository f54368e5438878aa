"""How a site comes into a federation: a request the site signs, and the invitation the coordinator answers with.

Both are public: whoever reads one learns addresses and public keys, and can do nothing with them.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import Encoding, load_ssh_public_key
from pydantic import AfterValidator, AwareDatetime, Field, StringConstraints, ValidationError

from cotune.shared.chain import PublicKey
from cotune.shared.errors import CotuneError, JobError, RefusedError
from cotune.shared.sections import Section, Sha256, SiteName
from cotune.shared.signing import Namespace, verify

PREFIX = "cotune-invite-1."
MAX_BYTES = 20_000
ASK_AGAIN = "send the site's request.json to the coordinator again: cotune fed approve request.json"
MAKE_REQUEST = "cotune site init"
Sign = Callable[[Namespace, bytes], str]


def _is_p384(line: str) -> str:
    """Refuse a line that has the shape of a node key and is no point on its curve."""
    try:
        key = load_ssh_public_key(line.encode())
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, EllipticCurvePublicKey) or not isinstance(key.curve, SECP384R1):
        raise ValueError("expected a P-384 public key in OpenSSH's form")
    return line


def _is_address(text: str) -> str:
    if not 1 <= int(text.rpartition(":")[2]) <= 65_535:
        raise ValueError("expected HOST:PORT with a port from 1 to 65535")
    return text


def _is_certificate(text: str) -> str:
    try:
        found = x509.load_pem_x509_certificates(text.encode())
    except ValueError:
        found = []
    if len(found) != 1:
        raise ValueError("expected one certificate in PEM form")
    return text


NodeKey = Annotated[
    str, StringConstraints(pattern=r"^ecdsa-sha2-nistp384 [A-Za-z0-9+/]{182}==$"), AfterValidator(_is_p384)
]
Address = Annotated[
    str,
    StringConstraints(pattern=r"^([A-Za-z0-9]([A-Za-z0-9.-]{0,252})|\[[0-9A-Fa-f:.]{2,45}\]):[0-9]{1,5}$"),
    AfterValidator(_is_address),
]
Certificate = Annotated[str, StringConstraints(max_length=8000), AfterValidator(_is_certificate)]
Signature = Annotated[str, StringConstraints(max_length=1000)]


class JoinRequest(Section):
    """A site's request to be let in; `cotune site init` writes it, and a coordinator approves it.

    Attributes:
        site: The site's public name.
        public_key: With which it signs updates and ledger heads, `ssh-ed25519 AAAA...`.
        node_key: With which its courier authenticates, `ecdsa-sha2-nistp384 AAAA...`.
        policy_sha256: Of the policy it had when it asked.
        cotune: Its version.
        signature: By `public_key`, namespace `cotune-request`: who asks holds that key, and chose the node key.
    """

    schema_: Literal[1] = Field(default=1, alias="schema")
    site: SiteName
    public_key: PublicKey
    node_key: NodeKey
    policy_sha256: Sha256
    cotune: str = Field(max_length=40)
    signature: Signature = ""

    def message(self) -> bytes:
        """What is signed: everything but the signature, as canonical JSON."""
        return _message(self)

    def signed(self, sign: Sign) -> JoinRequest:
        """The same request, signed."""
        return self.model_copy(update={"signature": sign("cotune-request", self.message())})

    def to_json(self) -> str:
        """The request as the file that is sent to a coordinator."""
        return self.model_dump_json(by_alias=True, indent=2) + "\n"


class Invite(Section):
    """A coordinator's answer to a request: where to go, whom to trust there, for one site and its key alone.

    Attributes:
        federation: The federation's name.
        address: HOST:PORT of its gateway.
        ca: The one certificate that may vouch for that address, as PEM.
        coordinator_key: Who signs jobs, `ssh-ed25519 AAAA...`.
        site: Whom it is for.
        site_key: That site's public key.
        expires: Until when it may be taken up.
        signature: By `coordinator_key`, namespace `cotune-invite`.
    """

    schema_: Literal[1] = Field(default=1, alias="schema")
    federation: SiteName
    address: Address
    ca: Certificate
    coordinator_key: PublicKey
    site: SiteName
    site_key: PublicKey
    expires: AwareDatetime
    signature: Signature = ""

    @property
    def ca_sha256(self) -> str:
        """SHA-256 of the certificate, hexadecimal."""
        der = x509.load_pem_x509_certificate(self.ca.encode()).public_bytes(Encoding.DER)
        return hashlib.sha256(der).hexdigest()

    def message(self) -> bytes:
        """What is signed: everything but the signature, as canonical JSON."""
        return _message(self)

    def sha256(self) -> str:
        """The invitation's name, however its text is wrapped or spelt."""
        return hashlib.sha256(self.message()).hexdigest()

    def signed(self, sign: Sign) -> Invite:
        """The same invitation, signed."""
        return self.model_copy(update={"signature": sign("cotune-invite", self.message())})

    def text(self) -> str:
        """One line, to be sent to the site by any means."""
        return PREFIX + base64.urlsafe_b64encode(self.model_dump_json(by_alias=True).encode()).decode()


Document = TypeVar("Document", JoinRequest, Invite)


def read_request(path: Path) -> JoinRequest:
    """Read a site's request; what is returned was signed by the key it names.

    Raises:
        JobError: E-REQUEST-FILE, E-REQUEST-FORM: there is no such file, or it is no request.
        RefusedError: E-REQUEST-SIGNATURE: a part of it was changed.
    """
    content = _content(path, "E-REQUEST-FILE", "the site's request.json", MAKE_REQUEST)
    request = _parsed(JoinRequest, content, "E-REQUEST-FORM", f"{path}: not a site's request", MAKE_REQUEST)
    if not verify(request.public_key, "cotune-request", request.message(), request.signature):
        raise RefusedError(
            "E-REQUEST-SIGNATURE",
            f"{path}: the request is not signed by the key it names: a part of it was changed",
            param="REQUEST",
            hint="ask the site for the request.json in its home, unchanged",
        )
    return request


def read_invite(text_or_path: str, now: datetime) -> Invite:
    """Read an invitation; what is returned was signed by the coordinator's key it names, and has not expired.

    Whether that key is the coordinator's, the site's administrator knows, by its fingerprint.

    Args:
        text_or_path: The line itself, or a file that holds it.
        now: The time, with its zone.

    Raises:
        JobError: E-INVITE-FILE, E-INVITE-FORM: there is no such file, or it is no invitation.
        RefusedError: E-INVITE-SIGNATURE, E-INVITE-EXPIRED.
    """
    invite = _parsed(Invite, _invite_json(text_or_path), "E-INVITE-FORM", "not a whole invitation", ASK_AGAIN)
    if not verify(invite.coordinator_key, "cotune-invite", invite.message(), invite.signature):
        raise RefusedError(
            "E-INVITE-SIGNATURE",
            "the invitation is not signed by the coordinator it names: a part of it was changed on the way",
            param="INVITE",
            hint=ASK_AGAIN,
        )
    if now >= invite.expires:
        raise RefusedError(
            "E-INVITE-EXPIRED",
            f"the invitation was good until {invite.expires:%Y-%m-%d %H:%M %Z}, it is {now:%Y-%m-%d %H:%M %Z} now",
            param="INVITE",
            hint=ASK_AGAIN,
        )
    return invite


def _message(document: JoinRequest | Invite) -> bytes:
    return document.model_copy(update={"signature": ""}).model_dump_json(by_alias=True).encode()


def _invite_json(text_or_path: str) -> bytes:
    text = "".join(text_or_path.split())  # a mail programme may have wrapped the line
    if not text.startswith("cotune-invite-"):
        content = _content(Path(text_or_path).expanduser(), "E-INVITE-FILE", "an invitation or its file", ASK_AGAIN)
        text = "".join(content.decode("utf-8", "replace").split())
    if not text.startswith(PREFIX):
        known = "a newer cotune made it" if re.match(r"cotune-invite-\d+\.", text) else f"it does not begin {PREFIX}"
        raise JobError("E-INVITE-FORM", f"expected an invitation: {known}", param="INVITE", hint=ASK_AGAIN)
    if len(text) > MAX_BYTES:
        raise JobError("E-INVITE-FORM", f"expected an invitation: over {MAX_BYTES:,} bytes", param="INVITE")
    encoded = text.removeprefix(PREFIX).rstrip("=")
    try:
        return base64.b64decode(encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise JobError(
            "E-INVITE-FORM", "not a whole invitation: letters are missing or changed", param="INVITE", hint=ASK_AGAIN
        ) from None


def _content(path: Path, code: str, what: str, hint: str) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no file can have this name"
        raise JobError(code, f"expected {what}: cannot be read ({reason})", hint=hint) from None
    if len(content) > MAX_BYTES:
        raise JobError(code, f"expected {what}: over {MAX_BYTES:,} bytes", hint=hint)
    return content


def _parsed(kind: type[Document], content: bytes, code: str, what: str, hint: str) -> Document:
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        raise _explained(error, code, what, hint) from None


def _explained(error: ValidationError, code: str, what: str, hint: str) -> CotuneError:
    fault = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in fault["loc"])[:60]
    said = fault["msg"].removeprefix("Value error, ")
    return JobError(code, f"{what}: {f'`{where}`: ' if where else ''}{said}", param=where or None, hint=hint)
