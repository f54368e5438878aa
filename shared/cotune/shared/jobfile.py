"""Reading and writing job files: strict, with line numbers and a "did you mean"."""

from __future__ import annotations

import contextlib
import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import tomli_w
import yaml
from pydantic import BaseModel, ValidationError

from cotune.shared.errors import JobError, did_you_mean
from cotune.shared.job import Job, absolute

MAX_BYTES = 1_000_000
SHOW_SCHEMA = "cotune config schema"


def load_job(path: Path, overrides: Iterable[str] = ()) -> Job:
    """Read a job file and apply ``section.key=value`` overrides.

    Data paths become absolute, relative to the file's folder; so does a model given as a folder or GGUF
    file that exists there.

    Raises:
        JobError: The file is missing, not TOML/YAML/JSON, or holds an unknown or impossible setting.
    """
    text = _read(path)
    data = _parse(text, path)
    for override in overrides:
        _apply_override(data, override)
    job = parse_job(data, origin=path.name, text=text)
    folder = path.resolve().parent
    changes: dict[str, dict[str, object]] = {
        "data": {
            "train": absolute(job.data.train, folder) if job.data.train else None,
            "sites": {name: absolute(file, folder) for name, file in job.data.sites.items()},
        },
        "eval": {"data": absolute(job.eval.data, folder) if job.eval.data else None},
    }
    if ":" not in job.model.base and _exists(folder / job.model.base):
        changes["model"] = {"base": str((folder / job.model.base).resolve())}
    return job.replace(**changes)


def _exists(path: Path) -> bool:
    with contextlib.suppress(OSError, ValueError):  # a name no file can have
        return path.exists()
    return False


def parse_job(data: Mapping[str, Any], *, origin: str, text: str = "") -> Job:
    """Validate a mapping as a job.

    Args:
        data: Sections of settings.
        origin: Where it came from, for the message.
        text: The file's text, to find line numbers in.

    Raises:
        JobError: With the first fault: the setting, its line and the nearest known name.
    """
    try:
        return Job.model_validate(data)
    except ValidationError as error:
        raise _explain(error, origin, text) from None


def dump_toml(job: Job) -> str:
    """The job as TOML; settings that are absent are left out, since TOML has no null."""
    return tomli_w.dumps(_without_none(job.model_dump(mode="json", by_alias=True)))


def _read(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise JobError(
            "E-CONFIG-FILE", f"{path}: cannot be read ({error.strerror})", hint="cotune init my-study"
        ) from None
    if len(raw) > MAX_BYTES:
        raise JobError("E-CONFIG-FILE", f"{path}: over {MAX_BYTES:,} bytes; this is not a job file")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise JobError("E-CONFIG-FILE", f"{path}: byte {error.start} is not UTF-8") from None


def _parse(text: str, path: Path) -> dict[str, Any]:
    try:
        if path.suffix in (".yaml", ".yml"):
            data = yaml.safe_load(text)
        elif path.suffix == ".json":
            data = json.loads(text)
        else:
            data = tomllib.loads(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise JobError("E-CONFIG-SYNTAX", f"{path}: {reason}", hint=SHOW_SCHEMA) from None
    if not isinstance(data, dict):
        raise JobError("E-CONFIG-SYNTAX", f"{path}: expected sections of settings", hint=SHOW_SCHEMA)
    return data


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, equals, literal = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise JobError("E-CONFIG-OVERRIDE", f"expected section.key=value, got `{override}`", param=key)
    try:
        value = tomllib.loads(f"x = {literal}")["x"]
    except (ValueError, RecursionError):
        value = literal.strip()
    node = data
    for part in parts[:-1]:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise JobError("E-CONFIG-OVERRIDE", f"`{part}` is a setting, not a section", param=key)
    node[parts[-1]] = value


def _explain(error: ValidationError, origin: str, text: str) -> JobError:
    fault = error.errors(include_url=False)[0]
    path = [str(part) for part in fault["loc"] if not str(part).startswith(("literal[", "function-"))]
    dotted = ".".join(path)
    line = _line_of(path, text)
    where = f"{origin} line {line}" if line else origin
    if fault["type"] == "extra_forbidden":
        known = _known_keys(path[:-1])
        nearest = did_you_mean(path[-1], known)
        if not nearest:
            nearest = did_you_mean(dotted, all_keys()) or f" Known here: {', '.join(sorted(known))}."
        elif path[:-1]:
            nearest = nearest.replace("`", f"`{'.'.join(path[:-1])}.", 1)
        return JobError(
            "E-CONFIG-KEY", f"`{dotted}` is not a setting.{nearest} ({where})", param=dotted, hint=SHOW_SCHEMA
        )
    if fault["type"] == "missing":
        message = f"`{dotted}` is required ({where})"
    else:
        message = f"{fault['msg'].removeprefix('Value error, ')} ({where})"
        message = f"`{dotted}`: {message}" if dotted else message
    return JobError("E-CONFIG-VALUE", message, param=dotted or None, hint=SHOW_SCHEMA)


def _known_keys(path: list[str]) -> list[str]:
    model: type[BaseModel] = Job
    for part in path:
        field = model.model_fields.get(part)
        annotation = field.annotation if field else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return [field.alias or name for name, field in model.model_fields.items()]


def all_keys() -> list[str]:
    """Every setting as ``section.key``."""
    return [
        f"{name}.{key}"
        for name, field in Job.model_fields.items()
        for annotation in [field.annotation, *get_args(field.annotation)]
        if isinstance(annotation, type) and issubclass(annotation, BaseModel)
        for key in annotation.model_fields
    ]


def _line_of(path: list[str], text: str) -> int | None:
    section, key = ".".join(path[:-1]), path[-1] if path else ""
    current = ""
    for number, line in enumerate(text.splitlines(), 1):
        header = re.match(r"\s*\[([^\[\]]+)\]\s*(#.*)?$", line)
        if header:
            current = header[1].strip()
            if current == ".".join(path):
                return number
        elif current == section and re.match(rf"\s*[\"']?{re.escape(key)}[\"']?\s*[=:]", line):
            return number
    return None


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None and item != {}}
    return value
