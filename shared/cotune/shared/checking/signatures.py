"""Who vouches for a claim: the coordinator and every site that took part, by keys an officer can compare."""

from __future__ import annotations

from collections.abc import Mapping

from cotune.shared.checking.checks import require
from cotune.shared.checking.examined import Examined
from cotune.shared.signers import COORDINATOR, NAMESPACE, read_signers, signature_path, signers_path
from cotune.shared.signing import key_fingerprint, verify

MAX_BYTES = 10_000


def coordinator(examined: Examined) -> str:
    """The coordinator's signature over the exact bytes of the claim."""
    said = examined.claim["coordinator"]
    _require_signed(examined, COORDINATOR, said["public_key"])
    simulated = ", a key made for this simulation" if said["simulated"] else ""
    return f"signed by {key_fingerprint(said['public_key'])}{simulated}"


def sites(examined: Examined) -> str:
    """Each site's signature, by the key that signed its ledger's head: it found its own entry right."""
    keys = _keys(examined)
    missing = [site for site in keys if site == COORDINATOR or not signature_path(examined.run, site).is_file()]
    for site in keys.keys() - set(missing):
        _require_signed(examined, site, keys[site])
    require(not missing, f"did not sign the claim: {', '.join(missing[:8])}{' ...' if len(missing) > 8 else ''}")
    return f"{len(keys)} sites signed, each by the key of its ledger"


def signers(examined: Examined) -> str:
    """Whether the keys are those an officer knows from elsewhere; without such a file, they are only shown."""
    keys = {COORDINATOR: examined.claim["coordinator"]["public_key"], **_keys(examined)}
    listed = read_signers(signers_path(examined.run)) if signers_path(examined.run).is_file() else {}
    other = sorted(who for who, key in keys.items() if key not in listed.get(who, ()))
    require(not other, f"privacy/allowed_signers has another key, or none, for {', '.join(other[:8])}")
    if examined.signers is None:
        shown = ", ".join(f"{who} {key_fingerprint(key)}" for who, key in list(keys.items())[:3])
        return f"by the run's own word; compare them, or give --signers FILE: {shown}{' ...' if len(keys) > 3 else ''}"
    strange = sorted(who for who, key in keys.items() if key not in examined.signers.get(who, ()))
    require(not strange, f"not the keys of --signers: {', '.join(strange[:8])}")
    return f"{len(keys)} keys, all in --signers"


def _keys(examined: Examined) -> Mapping[str, str]:
    return {site: examined.head(site).public_key for site in examined.took_part}


def _require_signed(examined: Examined, name: str, key: str) -> None:
    path = signature_path(examined.run, name)
    require(path.is_file(), f"{name}: its signature is missing")
    with path.open("rb") as file:
        signature = file.read(MAX_BYTES).decode(errors="replace")
    genuine = verify(key, NAMESPACE, examined.claim_bytes, signature)
    require(genuine, f"{name}: its signature is not of its key over this claim")
