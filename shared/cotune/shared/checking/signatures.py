"""Who vouches for a claim: the coordinator and every site that took part, by keys an officer can compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cotune.shared.checking.checks import require
from cotune.shared.checking.examined import Examined
from cotune.shared.signers import COORDINATOR, NAMESPACE, read_signers, signature_path, signers_path
from cotune.shared.signing import key_fingerprint, verify

MAX_BYTES = 10_000


def coordinator(examined: Examined) -> str:
    """The coordinator's signature over the exact bytes of the claim."""
    said = examined.claim["coordinator"]
    require(signature_path(examined.run, COORDINATOR).is_file(), "the coordinator's signature is missing")
    require(_signed(examined, COORDINATOR, said["public_key"]), "not of the coordinator's key over this claim")
    simulated = ", a key made for this simulation" if said["simulated"] else ""
    return f"signed by {key_fingerprint(said['public_key'])}{simulated}"


def sites(examined: Examined) -> str:
    """Each site's signature, by the key that signed its ledger's head: it found its own entry right."""
    keys = _keys(examined)
    missing = [site for site in keys if site == COORDINATOR or not signature_path(examined.run, site).is_file()]
    wrong = [site for site in keys if site not in missing and not _signed(examined, site, keys[site])]
    require(not wrong, f"signatures that are not of their site's key over this claim: {_some(wrong)}")
    require(not missing, f"did not sign the claim: {_some(missing)}")
    return f"{len(keys)} sites signed, each by the key of its ledger"


def signers(examined: Examined) -> str:
    """Whether the keys are those an officer knows from elsewhere; without such a file, they are only shown."""
    keys = {COORDINATOR: examined.claim["coordinator"]["public_key"], **_keys(examined)}
    listed = read_signers(signers_path(examined.run)) if signers_path(examined.run).is_file() else {}
    other = sorted(who for who, key in keys.items() if key not in listed.get(who, ()))
    require(not other, f"privacy/allowed_signers has another key, or none, for {_some(other)}")
    if examined.signers is None:
        shown = ", ".join(f"{who} {key_fingerprint(key)}" for who, key in list(keys.items())[:3])
        return f"by the run's own word; compare them, or give --signers FILE: {shown}{' ...' if len(keys) > 3 else ''}"
    strange = sorted(who for who, key in keys.items() if key not in examined.signers.get(who, ()))
    require(not strange, f"not the keys of --signers: {_some(strange)}")
    return f"{len(keys)} keys, all in --signers"


def _keys(examined: Examined) -> Mapping[str, str]:
    return {site: examined.head(site).public_key for site in examined.took_part}


def _signed(examined: Examined, name: str, key: str) -> bool:
    with signature_path(examined.run, name).open("rb") as file:
        signature = file.read(MAX_BYTES).decode(errors="replace")
    return verify(key, NAMESPACE, examined.claim_bytes, signature)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
