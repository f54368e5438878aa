"""Signatures that stock OpenSSH checks, and that pass for nothing they were not made for."""

import base64
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import given, settings
from hypothesis import strategies as st

from cotune.shared.signing import public_key_line, sign, verify

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER = Ed25519PrivateKey.from_private_bytes(bytes(32))
PUBLIC, OTHER_PUBLIC = public_key_line(KEY.public_key()), public_key_line(OTHER.public_key())
MESSAGE = b"hospital-a 12 " + b"ab" * 32 + b"\n"
SIGNATURE = sign(KEY, "cotune-head", MESSAGE)

needs_openssh = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="OpenSSH is not installed")


def ssh_accepts(folder: Path, signature: str, message: bytes, namespace: str, public: str = PUBLIC) -> bool:
    (folder / "allowed").write_text(f"site {public}\n")
    (folder / "signature").write_text(signature)
    command = ["ssh-keygen", "-Y", "verify", "-f", "allowed", "-I", "site", "-n", namespace, "-s", "signature"]
    return subprocess.run(command, cwd=folder, input=message, capture_output=True, check=False).returncode == 0


@needs_openssh
@pytest.mark.parametrize("message", [b"", MESSAGE, bytes(range(256)) * 1000], ids=["empty", "a head", "256 kB"])
def test_stock_openssh_accepts_what_we_sign_and_nothing_else(tmp_path: Path, message: bytes) -> None:
    signature = sign(KEY, "cotune-head", message)
    assert ssh_accepts(tmp_path, signature, message, "cotune-head")
    assert not ssh_accepts(tmp_path, signature, message + b"x", "cotune-head")
    assert not ssh_accepts(tmp_path, signature, message, "cotune-job")
    assert not ssh_accepts(tmp_path, signature, message, "cotune-head", OTHER_PUBLIC)


@needs_openssh
def test_openssh_signs_the_same_bytes_as_we_do_and_we_accept_them(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_bytes(KEY.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    key.chmod(0o600)
    command = ["ssh-keygen", "-Y", "sign", "-f", str(key), "-n", "cotune-job"]
    done = subprocess.run(command, input=MESSAGE, capture_output=True, check=True)
    assert done.stdout.decode() == sign(KEY, "cotune-job", MESSAGE)
    assert verify(PUBLIC, "cotune-job", MESSAGE, done.stdout.decode().replace("\n", "\r\n"))
    shown = subprocess.run(["ssh-keygen", "-y", "-f", str(key)], capture_output=True, check=True).stdout.decode()
    assert shown.split()[:2] == PUBLIC.split()


def test_a_public_key_has_openssh_s_form() -> None:
    assert re.fullmatch(r"ssh-ed25519 [A-Za-z0-9+/]{68}", PUBLIC)


def test_a_signature_is_for_one_key_one_purpose_and_one_message() -> None:
    assert verify(PUBLIC, "cotune-head", MESSAGE, SIGNATURE)
    assert verify(f"{PUBLIC} admin@hospital-a", "cotune-head", MESSAGE, SIGNATURE)
    assert not verify(OTHER_PUBLIC, "cotune-head", MESSAGE, SIGNATURE)
    assert not verify(PUBLIC, "cotune-job", MESSAGE, SIGNATURE)
    assert not verify(PUBLIC, "cotune-head", MESSAGE[:-1], SIGNATURE)


def test_no_changed_bit_of_a_signature_is_accepted() -> None:
    armor = SIGNATURE.splitlines()
    content = base64.b64decode("".join(armor[1:-1]))
    for bit in range(8 * len(content)):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        text = "\n".join([armor[0], base64.b64encode(changed).decode(), armor[-1]])
        assert not verify(PUBLIC, "cotune-head", MESSAGE, text), bit
    unchanged = "\n".join([armor[0], base64.b64encode(content).decode(), armor[-1]])
    assert verify(PUBLIC, "cotune-head", MESSAGE, unchanged)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(text=st.text(max_size=300) | st.binary(max_size=300).map(lambda b: base64.b64encode(b).decode()))
def test_anything_else_is_false_and_never_an_error(text: str) -> None:
    armored = SIGNATURE.splitlines()[0] + "\n" + text + "\n" + SIGNATURE.splitlines()[-1]
    for signature in (text, armored):
        assert not verify(PUBLIC, "cotune-head", MESSAGE, signature)
    for public in (text, "ssh-ed25519 " + text, "ssh-rsa " + PUBLIC.split()[1], PUBLIC[:-4]):
        assert not verify(public, "cotune-head", MESSAGE, SIGNATURE)
