"""The claim against what it is about: its form, the job, the events, the files, and what else repeats it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cotune.shared.checking.checks import Failed, require
from cotune.shared.checking.examined import UNPUBLISHED, Examined
from cotune.shared.files import file_sha256
from cotune.shared.privacy.claim import ClaimSubject, alike, build_claim, claim_id, statement_text
from cotune.shared.privacy.claim_form import json_schema

FREE = {"created", "software", "claim_id"}  # what only the signatures vouch for


def state(examined: Examined) -> str:
    """Whether the run ended as one that may be published."""
    said = examined.run.state()
    error = said["error"] or {}
    require(said["status"] == "succeeded", f"the run is {said['status']} {error.get('code', '')}: it published nothing")
    return "the run succeeded"


def files(examined: Examined) -> str:
    """Whether the folder is the one its manifest lists."""
    found = examined.run.files()
    links = sorted(name for name, path in found.items() if path.is_symlink())
    require(not links, f"a link, no file of the run: {', '.join(links[:5])}")
    path = examined.run.path / "MANIFEST.json"
    require(path.is_file(), f"MANIFEST.json: {UNPUBLISHED}")
    manifest: Mapping[str, str] = json.loads(path.read_bytes())
    changed = sorted(name for name, said in manifest.items() if name not in found or file_sha256(found[name]) != said)
    require(not changed, f"changed or missing: {', '.join(changed[:5])}")
    added = sorted(found.keys() - manifest.keys())
    require(not added, f"not in the manifest: {', '.join(added[:5])}")
    return f"{len(manifest)} files as in MANIFEST.json"


def form(examined: Examined) -> str:
    """Whether the claim is one, and of this version."""
    claim = examined.claim
    require(
        claim_id(claim) == claim["claim_id"], "claim.json was changed after it was made: its id is of other content"
    )
    schema = examined.run.privacy / "claim.schema.json"
    require(schema.is_file() and schema.read_text() == json_schema(), "claim.schema.json is not that of this version")
    return f"a whole claim of {claim['schema']}"


def job(examined: Examined) -> str:
    """Whether claim and folder speak of one job and run."""
    sha256, claim = examined.job.sha256(), examined.claim
    require(claim["job_sha256"] == sha256, "the claim is of another job than resolved.toml")
    require(claim["run_id"] == examined.run.run_id, "the claim is of another run than this folder's name says")
    return f"claim and resolved.toml name job {sha256[:12]}"


def claim(examined: Examined) -> str:
    """Whether job and events, by themselves, give this claim."""
    said = examined.claim
    require(bool(said["unprotected"]), "the claim says that nothing is unprotected, which is never so")
    private = examined.job.is_private
    require(private or said["guarantee"] is None, "the job gives no privacy, the claim promises some")
    subject = ClaimSubject(
        examined.run.run_id,
        {each["name"]: each["sha256"] for each in said["subject"]},
        said["evidence"]["reload_check"],
        {site["id"]: site["ledger_head"] for site in said["sites"] if site["ledger_head"]},
        (said["model"]["base"], said["model"]["base_sha256"]),
        said["coordinator"],
    )
    rebuilt = json.loads(json.dumps(build_claim(examined.job, examined.accounts, subject)))
    other = [key for key in rebuilt if key not in FREE and not alike(rebuilt[key], said.get(key))]
    require(not other, f"job and events give another claim: {', '.join(other)}")
    return "job and events give this claim" + ("" if said["guarantee"] else "; it promises NOTHING")


def subject(examined: Examined) -> str:
    """Whether the released files are those the claim is about, and all of them."""
    run, said = examined.run, {each["name"]: each["sha256"] for each in examined.claim["subject"]}
    found = run.files()
    for name, sha256 in said.items():
        require(name in found and file_sha256(found[name]) == sha256, f"{name} is not the file the claim is about")
    beside = [name for name in found if name.startswith(("adapter/", "personal/")) and Path(name).name != "README.md"]
    added = sorted(set(beside) - said.keys())
    require(not added, f"released, but not in the claim: {', '.join(added[:5])}")
    return "the claim is about these very files"


def summary(examined: Examined) -> str:
    """Whether the figures beside the claim are the claim's."""
    run, said = examined.run, examined.claim
    require((run.path / "summary.json").is_file(), f"summary.json: {UNPUBLISHED}")
    summed = run.summary()
    by_site = {site["site"]: (site["epsilon"], site["delta"], site["steps"]) for site in summed["sites"]}
    wanted = {site["id"]: (site["epsilon"], site["delta"], site["steps"]) for site in said["sites"]}
    require(by_site == wanted, "summary.json has other epsilons, deltas or steps than the claim")
    require(summed["non_private"] == (not examined.job.is_private), "summary.json says another privacy than the job")
    statement = run.privacy / "statement.txt"
    same = statement.is_file() and statement.read_text(encoding="utf-8") == statement_text(said)
    require(same, "statement.txt does not say what the claim says")
    return "summary.json and statement.txt say what the claim says"


def card(examined: Examined) -> str:
    """Whether each model card is what the run's own records give, and so says what the claim says."""
    from cotune.shared.report.card import cards

    run, _ = examined.run, examined.claim
    wanted = cards(run)
    require(run.adapter / "README.md" in wanted, f"{run.adapter.name}: {UNPUBLISHED}")
    for path, card in wanted.items():
        folder = path.parent
        require(path.is_file(), f"{folder.name}/README.md: {UNPUBLISHED}")
        said, made = path.read_text(encoding="utf-8").split("\n"), card.decode().split("\n")
        if said != made:
            pairs: list[tuple[Any, Any]] = list(zip([*said, None], [*made, None], strict=False))
            number = next(n for n, (one, other) in enumerate(pairs, 1) if one != other)
            raise Failed(f"{folder.name}/README.md line {number} is not what the run's records give")
    return f"{len(wanted)} model cards, as the run's records give them"
