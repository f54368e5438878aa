"""A run as a record of the Differential Privacy Deployments Registry (OpenDP and NIST), as YAML.

The form below is the part of the registry's schema of autumn 2026 that a run's facts fill: the same names, enumerations
and required fields, fewer optional ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from cotune.shared.errors import JobError, PrivacyError
from cotune.shared.exports.facts import BLANK, Facts

Text = str


class _Part(BaseModel):
    """A part of a record: no field the registry does not have."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class _Curator(_Part):
    data_curator_name: Text
    data_curator_type: Literal["Government", "Industry", "Nonprofit"]


class _Basic(_Part):
    name: Text
    data_curators: tuple[_Curator, ...] = Field(min_length=1)
    description: Text
    intended_use: Text
    data_product_type: Literal["Machine learning model"]
    data_product_region: Text
    publication_date: str = Field(pattern=r"^\d{4}-\d{2}-\d{2}$")


class _Variant(_Part):
    variant_name: Literal["Approximate DP"]
    data_domain: Text
    unprotected_quantities: Text


class _Parameters(_Part):
    epsilon: float = Field(ge=0)
    delta: float = Field(gt=0, lt=1)


class _Loss(_Part):
    privacy_unit: Text
    privacy_unit_details: Text
    privacy_parameters: _Parameters
    privacy_parameters_details: Text


class _Model(_Part):
    model_name: Literal["Federated"]
    model_name_details: Text
    actors: Text
    release_type: Literal["One release"]
    release_type_details: Text
    data_source_type: Literal["Static"]
    access_type: Literal["Non-interactive"]
    access_type_details: Text


class _Implementation(_Part):
    preprocessing_and_hyperparameter_tuning: Text
    mechanisms: Text
    composition: Text
    post_processing: Text
    justification: Text
    additional_information: Text


class _Reference(_Part):
    title: Text
    note: Text
    year: Text


class _Evidence(_Part):
    evidence_source_type: Literal["Authorized organizational attestation"]
    misc: _Reference


class _Administrative(_Part):
    evidence_sources: Mapping[Literal["privacy_claim"], _Evidence]
    status: Literal["Draft"]
    registry_authors: tuple[Text, ...] = Field(min_length=1)
    tier: Literal[3]


class _Deployment(_Part):
    basic: _Basic
    dp_variant: _Variant
    privacy_loss: _Loss
    deployment_model: _Model
    implementation: _Implementation
    administrative: _Administrative


class RegistryRecord(_Part):
    """A record, as a draft: only its authors may call it more."""

    url_slug: str = Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")
    deployment: _Deployment


def registry_yaml(facts: Facts, curators: str | None) -> str:
    """The record of a run; what only its controller knows is marked.

    Args:
        facts: Of the run.
        curators: What the sites are: government, industry or nonprofit.

    Raises:
        JobError: E-EXPORT-WHAT: it was not said; the registry takes no record without it.
        PrivacyError: E-NON-PRIVATE: the registry has differentially private deployments alone.
    """
    import yaml

    if not curators:
        raise JobError(
            "E-EXPORT-WHAT", "expected what the sites are: government, industry or nonprofit", param="--curators",
            hint="cotune export RUN --registry FILE --curators nonprofit",
        )  # fmt: skip
    if not facts.guarantee:
        raise PrivacyError("E-NON-PRIVATE", "the registry lists differentially private deployments; this run is none")
    record = RegistryRecord.model_validate(_record(facts, curators))

    class Blocks(yaml.SafeDumper):
        """Texts of several lines as blocks, which people can read and the registry asks for."""

    def block(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)

    Blocks.add_representer(str, block)
    return yaml.dump(record.model_dump(mode="json"), Dumper=Blocks, sort_keys=False, allow_unicode=True, width=100)


def _record(facts: Facts, curators: str) -> dict[str, Any]:
    claim = facts.claim
    slug = re.sub(r"[^a-z0-9]+", "-", claim["run_id"].lower()).strip("-")
    return {
        "url_slug": slug,
        "deployment": {
            "basic": _basic(facts, curators),
            "dp_variant": {
                "variant_name": "Approximate DP",
                "data_domain": f"The records of {len(claim['sites'])} sites, {facts.agreed}.",
                "unprotected_quantities": _listed(claim["unprotected"]),
            },
            "privacy_loss": _loss(facts),
            "deployment_model": _model(facts),
            "implementation": _implementation(facts),
            "administrative": _administrative(claim),
        },
    }


def _basic(facts: Facts, curators: str) -> dict[str, Any]:
    return {
        "name": facts.job.run.name,
        "data_curators": [
            {"data_curator_name": site["id"], "data_curator_type": curators.capitalize()}
            for site in facts.claim["sites"]
        ],
        "description": facts.training,
        "intended_use": BLANK,
        "data_product_type": "Machine learning model",
        "data_product_region": BLANK,
        "publication_date": facts.claim["created"][:10],
    }


def _loss(facts: Facts) -> dict[str, Any]:
    unit, guarantee = facts.claim["unit"], facts.guarantee
    persons = [f"{row['records']} rows of one person: epsilon {row['epsilon']}" for row in guarantee["person"]]
    details = [
        facts.claim["statement"],
        f"Without amplification by sampling: epsilon {guarantee['epsilon_without_amplification']:.4g}.",
        f"For one unit replaced by another: epsilon {guarantee['epsilon_replace_one']:.4g}.",
        *persons,
    ]
    return {
        "privacy_unit": "Person-level" if facts.unit == "person" else "Record-level",
        "privacy_unit_details": f"{unit['definition']}. Adjacency: {unit['adjacency']}. {unit['person_level']}.",
        "privacy_parameters": {"epsilon": guarantee["epsilon"], "delta": guarantee["delta"]},
        "privacy_parameters_details": _listed(details),
    }


def _model(facts: Facts) -> dict[str, Any]:
    claim = facts.claim
    return {
        "model_name": "Federated",
        "model_name_details": "Each site clips and adds noise before anything leaves it; no coordinator is trusted.",
        "actors": _listed(f"{each['who']}: sees {each['sees']}. {each['note']}" for each in claim["adversaries"]),
        "release_type": "One release",
        "release_type_details": claim["composition"]["across_runs"],
        "data_source_type": "Static",
        "access_type": "Non-interactive",
        "access_type_details": _listed(claim["releases"]),
    }


def _implementation(facts: Facts) -> dict[str, Any]:
    claim = facts.claim
    software = ", ".join(f"{name} {version}" for name, version in claim["software"].items())
    return {
        "preprocessing_and_hyperparameter_tuning": claim["composition"]["tuning"],
        "mechanisms": _listed(
            [*(f"{key}: {said}" for key, said in claim["mechanism"].items()), f"software: {software}"]
        ),
        "composition": _listed(f"{key.replace('_', ' ')}: {said}" for key, said in claim["composition"].items()),
        "post_processing": "Joining of updates, folding, encoding, scoring on public rows: after the noise.",
        "justification": BLANK,
        "additional_information": f"Sector of the data product: {BLANK}.",
    }


def _administrative(claim: Mapping[str, Any]) -> dict[str, Any]:
    note = f"Claim {claim['claim_id']}, signed by coordinator and sites; to be checked with: cotune verify RUN"
    reference = {"title": "Privacy claim of the run", "note": note, "year": claim["created"][:4]}
    evidence = {"evidence_source_type": "Authorized organizational attestation", "misc": reference}
    return {
        "evidence_sources": {"privacy_claim": evidence},
        "status": "Draft",
        "registry_authors": [BLANK],
        "tier": 3,
    }


def _listed(items: Iterable[str]) -> str:
    return "".join(f"- {item}\n" for item in items)
