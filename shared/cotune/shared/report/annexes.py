"""The run's facts in the order that four frameworks ask for them; what only people can answer is left blank."""

from __future__ import annotations

from dataclasses import dataclass

from cotune.shared.report import wording
from cotune.shared.report.attacks import build_attacks
from cotune.shared.report.evidence import Evidence, Record
from cotune.shared.report.footprint import footprint_sentence
from cotune.shared.report.groups import build_groups
from cotune.shared.report.method import Fact
from cotune.shared.report.verdict import Verdict, build_verdict, noun_of

BLANK = "(to be filled in by the controller)"
EXPERT = "(to be filled in by the expert)"


@dataclass(frozen=True)
class Annex:
    """One table with what it is for."""

    ident: str
    heading: str
    preface: str
    rows: tuple[Fact, ...]


def build_annexes(evidence: Evidence) -> tuple[Annex, ...]:
    """The annexes, each from this run's records."""
    verdict = build_verdict(evidence)
    return (
        Annex(
            "dpia",
            "A. Facts for a data protection impact assessment (GDPR Article 35(7))",
            "Points (a), (c) and (d) as far as this run knows them. The assessment itself is the controller's.",
            _dpia(evidence, verdict),
        ),
        Annex(
            "hipaa",
            "B. Sheet for an expert determination (HIPAA, 45 CFR 164.514(b)(1))",
            "Methods and figures an expert may use. It is no determination: that is the expert's own, with a name.",
            _hipaa(evidence, verdict),
        ),
        Annex(
            "annex-xi",
            "C. Technical documentation in the order of the EU AI Act, Annex XI, section 1",
            "For the adapter alone. Who must keep such documentation, and for which model, this page does not decide.",
            annex_xi(evidence),
        ),
        Annex(
            "iso",
            "D. Where the evidence is, by controls of ISO/IEC 42001 Annex A",
            "Files of the run folder that may serve as evidence for a control; whether it is met is an auditor's word.",
            ISO_42001,
        ),
    )


def _where(evidence: Evidence) -> str:
    sites = len(evidence.summary.get("sites") or []) or evidence.job.sites
    simulated = evidence.summary.get("engine") not in (None, "deployed")
    return f"{sites} sites, {'simulated on one machine' if simulated else 'each with its own records'}"


def _uncovered(verdict: Verdict) -> str:
    return "; ".join(verdict.uncovered)


def _dpia(evidence: Evidence, verdict: Verdict) -> tuple[Fact, ...]:
    job = evidence.job
    safeguards = "no clipping, no noise: none"
    if evidence.privacy == "private":
        safeguards = (
            "records stay at the site; each update is clipped and noised there before it leaves; each site has a "
            "budget and a ledger that only grows; every file of the run has a hash"
        )
    return (
        Fact("(a) Operations", f"Fine-tuning of {_model(evidence)} by {_where(evidence)}, {job.run.rounds} rounds"),
        Fact("(a) Purpose", BLANK),
        Fact("(a) Legitimate interest", BLANK),
        Fact("(a) Categories of data and persons", BLANK),
        Fact("(a) Recipients", "the coordinator (updates), other sites (adapters), whoever is given the adapter"),
        Fact("(b) Necessity and proportionality", BLANK),
        Fact("(c) Risk: a record or person is recognised", " ".join(verdict.strength)),
        Fact("(c) Risk: measured", build_attacks(evidence).sentence),
        Fact("(c) Risks not covered", _uncovered(verdict)),
        Fact("(d) Measures", safeguards),
        Fact("(d) Demonstrated by", "privacy/claim.json, privacy/ledgers/, MANIFEST.json; cotune verify checks them"),
        Fact("Advice of the data protection officer", BLANK),
        Fact("Views of the persons concerned", BLANK),
        Fact("Residual risk, decision and signature", BLANK),
    )


def _hipaa(evidence: Evidence, verdict: Verdict) -> tuple[Fact, ...]:
    guarantee: Record = evidence.guarantee
    method = "none: this run has no guarantee to determine anything from"
    if guarantee:
        method = (
            f"differential privacy, epsilon {wording.epsilon(guarantee.get('epsilon'))} at delta "
            f"{wording.delta(guarantee.get('delta'))}, for one {noun_of(evidence)}; privacy loss distributions"
        )
    found = build_attacks(evidence)
    return (
        Fact("Information examined", f"The adapter of run {evidence.run_id}, and nothing else"),
        Fact("Anticipated recipient", BLANK),
        Fact("Method", method),
        Fact("Result of the method", " ".join((*verdict.strength, *verdict.figures))),
        Fact("Result of attacks", found.sentence),
        Fact("Limits of the attacks", "; ".join(found.limits) or "none stated"),
        Fact("Outside the method", _uncovered(verdict)),
        Fact("Other information reasonably available to the recipient", EXPERT),
        Fact("Is the risk very small?", EXPERT),
        Fact("Valid until", EXPERT),
        Fact("Expert: name, qualification, experience", EXPERT),
        Fact("Date and signature", EXPERT),
    )


def annex_xi(evidence: Evidence) -> tuple[Fact, ...]:
    """What section 1 of Annex XI lists, as far as a run knows it."""
    job, summary = evidence.job, evidence.summary
    adapter: Record = summary.get("adapter") or {}
    hardware = ", ".join(str(evidence.hardware[key]) for key in ("system", "machine") if evidence.hardware.get(key))
    cores = f", {evidence.hardware['cores']} cores" if evidence.hardware.get("cores") else ""
    groups = build_groups(evidence)
    return (
        Fact("1(a) Tasks", f"{job.task.kind}: {job.run.name}"),
        Fact("1(b) Acceptable use", "(to be filled in by the provider)"),
        Fact("1(c) Date of release", wording.moment(evidence.claim.get("created"))),
        Fact(
            "1(d) Architecture and parameters",
            f"{_model(evidence)}; adapter of rank {job.lora.r} with "
            f"{wording.count(adapter.get('parameters'))} trained numbers",
        ),
        Fact("1(e) Modality", "text in, text out" if job.task.kind == "completion" else "text in, a class out"),
        Fact("1(f) Licence", "as the base model's"),
        Fact("2(a) Means to integrate", "a PEFT folder; the page shows the lines that load it"),
        Fact(
            "2(b) Design and training",
            f"{job.aggregation.rule} over {job.run.rounds} rounds of {job.train.local_steps} steps at each site, "
            f"{job.train.optimizer}; see the engineer's part for every setting",
        ),
        Fact(
            "2(c) Data",
            f"{_where(evidence)}, {job.data.records_per_site:,} records each by agreement; provenance and curation "
            "are the sites' to state",
        ),
        Fact("2(c) Unsuitable data and bias", f"{groups.sentence}"),
        Fact(
            "2(d) Computation",
            f"{wording.duration(summary.get('seconds'))} on {hardware or 'a machine not recorded'}{cores}; "
            "operations not counted",
        ),
        Fact("2(e) Energy", footprint_sentence(evidence)),
    )


def _model(evidence: Evidence) -> str:
    model: Record = evidence.summary.get("model") or {}
    return wording.model_name(str(model.get("base") or evidence.job.model.base))


ISO_42001 = (
    Fact("A.5 Impact assessment", "Annex A of this page: facts for it; the assessment is the controller's"),
    Fact("A.6.2.4 Verification and validation", "cotune verify; eval figures in summary.json; attack/results.json"),
    Fact("A.6.2.6 Operation and monitoring", "metrics.jsonl, events.jsonl, state.json"),
    Fact("A.6.2.7 Technical documentation", "this page; adapter/README.md; resolved.toml"),
    Fact("A.6.2.8 Event logs", "privacy/ledgers/ (hash-chained, signed heads); events.jsonl"),
    Fact("A.7.3 Acquisition of data", "job approval at each site: its ledger; the sites' own policies"),
    Fact("A.7.5 Data provenance", "digests of data sets, in each site's own ledger"),
    Fact("A.8.2 Information for users", "the first part of this page; adapter/README.md; privacy/statement.txt"),
    Fact("A.9.4 Intended use", "adapter/README.md, Use and limits"),
    Fact("A.10.3 Suppliers", "base model and software by hash and version: summary.json, env/lock.txt"),
)
