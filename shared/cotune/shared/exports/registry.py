"""A run as a record of the Differential Privacy Deployments Registry (OpenDP and NIST), as YAML.

The form below has the fields of the registry's published records of September 2026.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from cotune.shared.errors import PrivacyError
from cotune.shared.exports.facts import BLANK, Facts

Text = str


class _Part(BaseModel):
    """A part of a record: no field the registry does not have."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class _Curator(_Part):
    data_curator_name: Text


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


class _Accounting(_Part):
    post_processing: Text
    composition: Text


class _Implementation(_Part):
    preprocessing_and_hyperparameter_tuning: Text
    mechanisms: Text
    justification: Text


class _Administrative(_Part):
    sources: Text
    notes: Text
    registry_authors: tuple[Text, ...] = Field(min_length=1)


class _Deployment(_Part):
    basic: _Basic
    dp_variant: _Variant
    privacy_loss: _Loss
    deployment_model: _Model
    accounting: _Accounting
    implementation: _Implementation
    administrative: _Administrative


class RegistryRecord(_Part):
    """A record, as a draft: only its authors may call it more."""

    url_slug: str = Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")
    status: Literal["Draft"]
    tier: Literal[3]
    deployment: _Deployment


def registry_yaml(facts: Facts) -> str:
    """The record of a run; what only its controller knows is marked.

    Raises:
        PrivacyError: E-NON-PRIVATE: the registry has differentially private deployments alone.
    """
    import yaml

    if not facts.guarantee:
        raise PrivacyError("E-NON-PRIVATE", "the registry lists differentially private deployments; this run is none")
    record = RegistryRecord.model_validate(_record(facts))
    return yaml.safe_dump(record.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)


def _record(facts: Facts) -> dict[str, Any]:
    claim = facts.claim
    slug = re.sub(r"[^a-z0-9]+", "-", claim["run_id"].lower()).strip("-")
    return {
        "url_slug": slug,
        "status": "Draft",
        "tier": 3,
        "deployment": {
            "basic": _basic(facts),
            "dp_variant": {
                "variant_name": "Approximate DP",
                "data_domain": f"The records of {len(claim['sites'])} sites, {facts.agreed}.",
                "unprotected_quantities": _listed(claim["unprotected"]),
            },
            "privacy_loss": _loss(facts),
            "deployment_model": _model(facts),
            "accounting": {
                "post_processing": "Joining of updates, folding, encoding, scoring on public rows: after the noise.",
                "composition": _listed(
                    f"{key.replace('_', ' ')}: {said}" for key, said in claim["composition"].items()
                ),
            },
            "implementation": _implementation(facts),
            "administrative": {
                "sources": f"Privacy claim {claim['claim_id']}, signed by coordinator and sites; cotune verify RUN.",
                "notes": f"Sector and type of the curators: {BLANK}.",
                "registry_authors": [BLANK],
            },
        },
    }


def _basic(facts: Facts) -> dict[str, Any]:
    return {
        "name": facts.job.run.name,
        "data_curators": [{"data_curator_name": site["id"]} for site in facts.claim["sites"]],
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
        "justification": BLANK,
    }


def _listed(items: Iterable[str]) -> str:
    return "".join(f"- {item}\n" for item in items)
