"""The adapter's model card: README.md with the front matter the Hugging Face Hub reads."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cotune.shared.report import wording
from cotune.shared.report.annexes import annex_xi
from cotune.shared.report.content import Content, build_content
from cotune.shared.report.evidence import Evidence, Record, read_evidence
from cotune.shared.report.method import Fact, load_snippet
from cotune.shared.report.page import read_template
from cotune.shared.report.scores import base_score, federated_score
from cotune.shared.runs import RunFolder

if TYPE_CHECKING:
    from jinja2 import Environment


def model_card(run: RunFolder, site: str | None = None) -> str:
    """README.md for one of a run's adapters, every section filled from the run's records.

    Args:
        run: The run.
        site: Whose own adapter it is; None for the run's.

    Raises:
        JobError: A file of the run is damaged.
    """
    from markupsafe import Markup

    evidence = read_evidence(run)
    content = build_content(evidence)
    if site:
        snippet = load_snippet(evidence, f"personal/{site}")
        content = replace(content, name=f"{content.name}: adapter of {site}", snippet=snippet)
    template = markdown_environment().from_string(read_template("card.md.j2"))
    return template.render(
        c=content,
        base=_base(evidence),
        front_matter=Markup(front_matter(evidence, content)),  # noqa: S704 - quoted by the YAML writer
        snippet=Markup(content.snippet),  # noqa: S704 - inside a code block, its names quoted by repr
        verify=Markup(f"`cotune verify {content.run_id}`"),  # noqa: S704 - a run id has no special character
        environment=_environment(evidence),
        annex_xi=annex_xi(evidence),
    )


def markdown_environment() -> Environment:
    """Where templates of Markdown are filled in: every value is escaped."""
    from jinja2 import Environment, StrictUndefined

    return Environment(  # noqa: S701 - Markdown: `finalize` escapes every value
        finalize=escape_markdown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def cards(run: RunFolder) -> dict[Path, bytes]:
    """The card of the run's adapter and of each site's own, by file; none of an adapter that is not there.

    Raises:
        JobError: A file of the run is damaged.
    """
    owners = {run.adapter: None, **{folder: folder.name for folder in personal_folders(run)}}
    there = {folder: site for folder, site in owners.items() if (folder / "adapter_config.json").exists()}
    return {folder / "README.md": model_card(run, site).encode() for folder, site in there.items()}


def personal_folders(run: RunFolder) -> list[Path]:
    """The folders of the sites' own adapters, in order; none but by rules that make such."""
    return sorted(run.personal.iterdir()) if run.personal.is_dir() else []


def front_matter(evidence: Evidence, content: Content) -> str:
    """The card's YAML: what hubs and catalogues index. The base model is an id, never a path."""
    import yaml

    private = evidence.privacy == "private" and not evidence.is_broken
    privacy_tags = ["differential-privacy", "dp-sgd"] if private else ["NOT-PRIVATE", "do-not-publish"]
    unit: Record = evidence.claim.get("unit") or {}
    mechanism: Record = evidence.claim.get("mechanism") or {}
    final, _ = federated_score(evidence)
    data = {
        "license": "other",
        "license_name": "as-the-base-model",
        "base_model": _base(evidence),
        "library_name": "peft",
        "tags": ["lora", "peft", "federated-learning", "cotune", *privacy_tags],
        "metrics": [name for name in ("accuracy", "loss") if final.get(name) is not None],
        "model-index": [{"name": content.name, "results": _results(evidence, final)}],
        "x-privacy": {
            "private": private,
            "epsilon": evidence.guarantee.get("epsilon") if private else None,
            "delta": evidence.guarantee.get("delta") if private else None,
            "unit": unit.get("definition") or ("one record" if private else None),
            "accountant": (mechanism.get("accountant") or "privacy/accountant.json") if private else None,
            "claim": evidence.claim.get("claim_id") if private else None,
        },
    }
    return yaml.safe_dump(_one_line(data), sort_keys=False, allow_unicode=True, width=math.inf)


def escape_markdown(value: object) -> object:
    """A value as plain text: one line, no markup, no HTML. Markup made by this module passes."""
    from markupsafe import Markup

    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    line = wording.plain(" ".join(value.split()))
    return re.sub(r"([\\`*\[\]|])", r"\\\1", line).replace("<", "&lt;").replace(">", "&gt;")


def _one_line(value: object) -> object:
    """The same with every text on one line, so that none can hold the line that ends the front matter."""
    if isinstance(value, dict):
        return {key: _one_line(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_one_line(item) for item in value]
    return wording.plain(" ".join(value.split())) if isinstance(value, str) else value


def _base(evidence: Evidence) -> str:
    model: Record = evidence.summary.get("model") or {}
    return wording.model_name(str(model.get("base") or evidence.job.model.base))


def _results(evidence: Evidence, final: Record) -> list[dict[str, object]]:
    """The final and the base model's figures, as the Hub's leader boards read them."""
    held_out = evidence.job.eval.data
    metrics = [
        {"type": kind, "name": name + suffix, "value": scores[kind]}
        for scores, suffix in ((final, ""), (base_score(evidence), " (base model)"))
        for kind, name in (("accuracy", "Accuracy"), ("loss", "Loss"))
        if scores.get(kind) is not None
    ]
    if not metrics:
        return []
    task = "text-classification" if evidence.job.task.kind == "classify" else "text-generation"
    name = wording.file_name(held_out) if held_out else "held-out rows"
    return [{"task": {"type": task}, "dataset": {"type": "private", "name": name}, "metrics": metrics}]


def _environment(evidence: Evidence) -> list[Fact]:
    software: Record = evidence.claim.get("software") or {}
    memory = evidence.hardware.get("memory_bytes")
    facts = [Fact(str(name), str(version)) for name, version in software.items()]
    facts += [
        Fact(key, str(evidence.hardware[key])) for key in ("system", "python", "cores") if key in evidence.hardware
    ]
    return [*facts, Fact("memory", wording.size(memory))] if memory else facts
