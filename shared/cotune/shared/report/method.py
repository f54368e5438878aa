"""How a run was trained, as rows of a table, and how its adapter is loaded."""

from __future__ import annotations

from typing import NamedTuple

from cotune.shared.job import Job
from cotune.shared.report import wording
from cotune.shared.report.evidence import Evidence, Record


class Fact(NamedTuple):
    """One row: what, and its value as printed."""

    label: str
    value: str


def training_facts(evidence: Evidence) -> tuple[Fact, ...]:
    """Model, adapter and job; rows without a value are left out."""
    facts = (*_model_facts(evidence), *_job_facts(evidence))
    return tuple(fact for fact in facts if fact.value)


def _model_facts(evidence: Evidence) -> tuple[Fact, ...]:
    model: Record = evidence.summary.get("model") or {}
    adapter: Record = evidence.summary.get("adapter") or {}
    settings, lora = evidence.job.model, evidence.job.lora
    return (
        Fact("Base model", wording.model_name(str(model.get("base") or settings.base))),
        Fact("Base model's SHA-256", str(model.get("sha256") or settings.sha256 or "")),
        Fact(
            "Base model's weights",
            f"dequantised from {model['dequantised']}" if model.get("dequantised") else "",
        ),
        Fact("Base model's parameters", wording.count(model["parameters"]) if model.get("parameters") else ""),
        Fact("Adapter", f"LoRA, rank {lora.r}, alpha {lora.alpha:g}, on {', '.join(lora.target_modules)}"),
        Fact("Trained part", str(adapter.get("trained") or "")),
        Fact("Trained parameters", wording.count(adapter["parameters"]) if adapter.get("parameters") else ""),
        Fact("Adapter's SHA-256", str(adapter.get("sha256") or "")),
        *_personal_facts(evidence),
    )


def _personal_facts(evidence: Evidence) -> tuple[Fact, ...]:
    """Which adapters there are where each site has one, and how they score."""
    personal: Record = evidence.summary.get("personal") or {}
    if not personal:
        return ()
    spread = (
        f"{name} {shown(of['mean'])} on average ({shown(of['lowest'])} to {shown(of['highest'])})"
        for name, shown in (("accuracy", wording.percent), ("loss", wording.decimal))
        if (of := personal.get(name))
    )
    return (
        Fact(
            "Adapters", f"personal/SITE for each of {len(personal['sites'])} sites, with its own B; {personal['note']}"
        ),
        Fact("The sites' own adapters", "; ".join(spread)),
    )


def _job_facts(evidence: Evidence) -> tuple[Fact, ...]:
    job, summary, train = evidence.job, evidence.summary, evidence.job.train
    sites = len(summary.get("sites") or []) or job.sites
    momentum = f", momentum {train.momentum:g}" if train.momentum else ""
    return (
        Fact("Task", job.task.kind),
        Fact("Records are cut to", f"{job.model.max_length} tokens"),
        Fact("Sites", f"{sites}, each with {_agreed(evidence)} (agreed public numbers)"),
        Fact("Rounds", f"{job.run.rounds}, with {train.local_steps} steps at each site"),
        Fact("Batch", f"{train.batch_size} {'persons' if job.privacy.level == 'unit' else 'records'} expected"),
        Fact(
            "Optimizer",
            f"{train.optimizer}{momentum}, learning rate {train.learning_rate:g}, {train.schedule}",
        ),
        Fact("Joining of updates", _joining(job)),
        Fact("Held-out rows", wording.file_name(job.eval.data) if job.eval.data else ""),
        Fact("Engine", str(summary.get("engine") or "")),
        Fact("Time", wording.duration(summary["seconds"]) if summary.get("seconds") else ""),
        Fact("Data sent by sites", wording.size(summary["bytes_up"]) if summary.get("bytes_up") else ""),
        Fact("Data received by sites", wording.size(summary["bytes_down"]) if summary.get("bytes_down") else ""),
        Fact("Public seed", str(job.run.seed)),
        Fact("Job's SHA-256", str(summary.get("job_sha256") or job.sha256())),
    )


def _joining(job: Job) -> str:
    settings = job.aggregation
    parts = [settings.rule, "public weights" if settings.weights else "equal weights"]
    parts += [f"robust: {settings.robust}"] if settings.robust != "none" else []
    parts += [f"{settings.optimizer} at the coordinator"] if settings.optimizer != "none" else []
    return ", ".join(parts)


def _agreed(evidence: Evidence) -> str:
    data = evidence.job.data
    persons = f" of {data.units_per_site:,} persons" if data.units_per_site else ""
    return f"{data.records_per_site:,} records{persons}"


def mechanism_facts(evidence: Evidence) -> tuple[Fact, ...]:
    """Sampling, noise and clipping, and what the claim says of mechanism, trust and composition."""
    if evidence.privacy == "none":
        return (Fact("Differential privacy", "not used: no clipping bound and no noise is claimed"),)
    job = evidence.job
    sites: list[Record] = evidence.claim.get("sites") or []
    noise = job.privacy.noise_multiplier
    facts = [
        Fact("Sampling", _range(sites, "sampling") or "poisson"),
        Fact("Sampling probability", _range(sites, "sampling_probability") or f"{job.sampling_probability:.4g}"),
        Fact(
            "Noise multiplier",
            _range(sites, "noise_multiplier") or (noise if isinstance(noise, str) else f"{noise:.4g}"),
        ),
        Fact("Clipping norm", _range(sites, "clipping_norm") or f"{job.privacy.clipping_norm:g}"),
        Fact("Noisy steps at each site", _range(sites, "steps") or f"{job.steps_per_site} planned"),
    ]
    if evidence.privacy == "test-noise":
        return (*facts, Fact("Noise", "seeded for tests: NOT PRIVATE"))
    for prefix, section in (
        ("Mechanism: ", "mechanism"),
        ("Trust: ", "threat_model"),
        ("Composition: ", "composition"),
    ):
        said: Record = evidence.claim.get(section) or {}
        facts += [Fact(prefix + _label(key), _value(value)) for key, value in said.items()]
    facts += [Fact("Released by each site", "; ".join(evidence.claim.get("releases") or []))]
    return tuple(facts)


def load_snippet(evidence: Evidence, folder: str = "adapter") -> str:
    """Python that loads the adapter in a folder on its base; names are quoted, whatever they hold."""
    model: Record = evidence.summary.get("model") or {}
    name = wording.model_name(str(model.get("base") or evidence.job.model.base))
    sha256 = " ".join(str(model.get("sha256") or "not recorded").split())
    classify = evidence.job.task.kind == "classify"
    auto = "AutoModelForSequenceClassification" if classify else "AutoModelForCausalLM"
    options = ', dtype="float32"' + (f", num_labels={len(evidence.job.task.labels)}" if classify else "")
    lines = [
        "from peft import PeftModel",
        f"from transformers import {auto}",
        "",
        f"# sha256 of the base: {sha256}",
    ]
    if model.get("dequantised"):
        lines += [f"FOLDER, FILE = 'folder/of/base', 'base.gguf'  # where you keep {name!r}"]
        source = "FOLDER, gguf_file=FILE"
    elif "/" in name:
        source = repr(name)
    else:
        lines += [f"FOLDER = 'folder/of/base'  # where you keep {name!r}"]
        source = "FOLDER"
    lines += [f"base = {auto}.from_pretrained({source}{options})"]
    lines += [f"model = PeftModel.from_pretrained(base, {folder!r})  # the folder {folder}/ of this run"]
    return "\n".join(lines)


def _range(sites: list[Record], key: str) -> str:
    """One value if all sites share it, else the least and the greatest."""
    values = sorted({site[key] for site in sites if site.get(key) is not None})
    texts = [value if isinstance(value, str) else f"{value:.4g}" for value in values]
    return texts[0] if len(texts) == 1 else f"{texts[0]} to {texts[-1]}" if texts else ""


def _label(key: str) -> str:
    return str(key).replace("_", " ")


def _value(value: object) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{_label(key)}: {_value(item)}" for key, item in value.items())
    return ", ".join(_value(item) for item in value) if isinstance(value, list) else str(value)
