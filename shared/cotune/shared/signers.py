"""Who signed a run's claim, in the files that stock `ssh-keygen -Y verify` reads.

privacy/signatures/NAME.sig   signatures over the exact bytes of claim.json: `coordinator`, and each site by its name
privacy/allowed_signers       the keys they were made with, by the run's own word
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from cotune.shared.errors import JobError
from cotune.shared.runs import RunFolder

COORDINATOR = "coordinator"
NAMESPACE = "cotune-claim"
MAX_BYTES = 10_000_000
_LINE = re.compile(r'(?P<who>\S+)\s+(?:(?P<options>(?:[^\s"]|"[^"]*")+)\s+)?(?P<key>ssh-ed25519\s+\S+)(\s.*)?')
_NAMESPACES = re.compile(r'namespaces="([^"]*)"')


def signature_path(run: RunFolder, name: str) -> Path:
    """Where the signature of the coordinator or a site is."""
    return run.privacy / "signatures" / f"{name}.sig"


def signers_path(run: RunFolder) -> Path:
    """Where the run says who signed with which key."""
    return run.privacy / "allowed_signers"


def signers_text(keys: Mapping[str, str]) -> str:
    """The content of an allowed_signers file.

    Args:
        keys: `ssh-ed25519 AAAA...` by name.
    """
    return "".join(f'{name} namespaces="{NAMESPACE}" {key}\n' for name, key in keys.items())


def read_signers(path: Path) -> dict[str, frozenset[str]]:
    """The keys that may sign claims, by name, of an allowed_signers file.

    Edge cases: keys of other kinds, and those for other purposes, are passed over: no claim is signed with them.

    Raises:
        JobError: E-SIGNERS: it cannot be read; a line of it cannot, or asks for what cotune does not check, such as
            patterns of names, authorities and dates.
    """
    try:
        content = path.read_bytes()[:MAX_BYTES].decode()
    except (OSError, UnicodeDecodeError):
        raise JobError("E-SIGNERS", f"{path}: cannot be read", param="--signers", hint="man ssh-keygen") from None
    found: dict[str, set[str]] = {}
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#") or "ssh-ed25519" not in line:
            continue
        read = _LINE.fullmatch(line.strip())
        options = (read["options"] or "") if read else ""
        if not read or _NAMESPACES.sub("", options).strip(",") or re.search(r"[*?!]", read["who"]):
            what = f'{path} line {number}: expected NAME[,NAME] [namespaces="..."] ssh-ed25519 KEY'
            raise JobError("E-SIGNERS", what, param="--signers", hint="see privacy/allowed_signers of a run")
        purposes = _NAMESPACES.search(options)
        if purposes is None or NAMESPACE in purposes[1].split(","):
            for who in read["who"].split(","):
                found.setdefault(who, set()).add(" ".join(read["key"].split()))
    return {who: frozenset(keys) for who, keys in found.items()}
