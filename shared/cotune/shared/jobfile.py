"""Reading and writing settings files: strict, with line numbers and a "did you mean". The job file is one kind."""

from __future__ import annotations

import contextlib
import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, get_args

import tomli_w
import yaml
from pydantic import BaseModel, ValidationError

from cotune.shared.errors import JobError, did_you_mean
from cotune.shared.job import Job, absolute

MAX_BYTES = 1_000_000
SHOW_SCHEMA = "cotune config schema"
M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True)
class SettingsKind(Generic[M]):
    """A kind of settings file.

    Attributes:
        model: What it is read into.
        code: How the codes of its errors begin.
        name: What it is called in a message.
        make: The command that makes one.
        describe: The command that tells what may be in one.
    """

    model: type[M]
    code: str
    name: str
    make: str
    describe: str


JOB_FILE = SettingsKind(Job, "E-CONFIG", "job file", "cotune init my-study", SHOW_SCHEMA)


def load_job(path: Path, overrides: Iterable[str] = ()) -> Job:
    """Read a job file and apply ``section.key=value`` overrides.

    Data paths become absolute, relative to the file's folder; so does a model given as a folder or GGUF
    file that exists there.

    Raises:
        JobError: The file is missing, not TOML/YAML/JSON, or holds an unknown or impossible setting.
    """
    text = read_text(path, JOB_FILE)
    data = parse_text(text, path, JOB_FILE)
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
        "aggregation": {"root": absolute(job.aggregation.root, folder) if job.aggregation.root else None},
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
    return validate(data, JOB_FILE, origin=origin, text=text)


def validate(data: Mapping[str, Any], kind: SettingsKind[M], *, origin: str, text: str = "") -> M:
    """Validate a mapping as settings of a kind; arguments and errors as for `parse_job`."""
    try:
        return kind.model.model_validate(data)
    except ValidationError as error:
        raise _explain(error, kind, origin, text) from None


def dump_toml(job: Job) -> str:
    """The job as TOML; settings that are absent are left out, since TOML has no null."""
    return tomli_w.dumps(_without_none(job.model_dump(mode="json", by_alias=True)))


def read_text(path: Path, kind: SettingsKind[Any]) -> str:
    """A settings file's text.

    Raises:
        JobError: It cannot be read, is too large or is not UTF-8.
    """
    code = f"{kind.code}-FILE"
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise JobError(code, f"{path}: cannot be read ({error.strerror})", hint=kind.make) from None
    if len(raw) > MAX_BYTES:
        raise JobError(code, f"{path}: over {MAX_BYTES:,} bytes; this is not a {kind.name}")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise JobError(code, f"{path}: byte {error.start} is not UTF-8") from None


def parse_text(text: str, path: Path, kind: SettingsKind[Any]) -> dict[str, Any]:
    """A settings file's text as a mapping: YAML and JSON by extension, TOML otherwise.

    Raises:
        JobError: It is none.
    """
    code = f"{kind.code}-SYNTAX"
    try:
        if path.suffix in (".yaml", ".yml"):
            data = yaml.safe_load(text)
        elif path.suffix == ".json":
            data = json.loads(text)
        else:
            data = tomllib.loads(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise JobError(code, f"{path}: {reason}", hint=kind.describe) from None
    if not isinstance(data, dict):
        raise JobError(code, f"{path}: expected sections of settings", hint=kind.describe)
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


def _explain(error: ValidationError, kind: SettingsKind[Any], origin: str, text: str) -> JobError:
    faults = error.errors(include_url=False)
    fault = next((each for each in faults if each["type"] == "extra_forbidden"), faults[0])  # a slip explains a lack
    path = [part for part in fault["loc"] if not str(part).startswith(("literal[", "function-"))]
    names = [part for part in path if isinstance(part, str)]
    dotted = ".".join(names)
    line = _line_of(path, text)
    where = f"{origin} line {line}" if line else origin
    if fault["type"] == "extra_forbidden":
        known = _known_keys(names[:-1], kind.model)
        nearest = did_you_mean(names[-1], known)
        if not nearest:
            nearest = did_you_mean(dotted, all_keys(kind.model)) or f" Known here: {', '.join(sorted(known))}."
        elif names[:-1]:
            nearest = nearest.replace("`", f"`{'.'.join(names[:-1])}.", 1)
        message = f"`{dotted}` is not a setting.{nearest} ({where})"
        return JobError(f"{kind.code}-KEY", message, param=dotted, hint=kind.describe)
    if fault["type"] == "missing":
        message = f"`{dotted}` is required ({where})"
    else:
        message = f"{fault['msg'].removeprefix('Value error, ')} ({where})"
        message = f"`{dotted}`: {message}" if dotted else message
    return JobError(f"{kind.code}-VALUE", message, param=dotted or None, hint=kind.describe)


def _section(annotation: Any) -> type[BaseModel] | None:
    """The settings an annotation holds: those of a section, or of each of a list of sections."""
    candidates: list[Any] = [annotation, *get_args(annotation)]
    return next((each for each in candidates if isinstance(each, type) and issubclass(each, BaseModel)), None)


def _known_keys(path: list[str], model: type[BaseModel]) -> list[str]:
    for part in path:
        field = model.model_fields.get(part)
        section = _section(field.annotation) if field else None
        if section is None:
            return []
        model = section
    return [field.alias or name for name, field in model.model_fields.items()]


def all_keys(model: type[BaseModel] = Job) -> list[str]:
    """Every setting as ``section.key``."""
    return [
        f"{name}.{key}"
        for name, field in model.model_fields.items()
        if (section := _section(field.annotation))
        for key in section.model_fields
    ]


def _line_of(path: list[str | int], text: str) -> int | None:
    """The line of a setting; of a list of sections, each begins with its header in double brackets."""
    wanted = [str(part) for part in path]
    section, key = wanted[:-1], wanted[-1] if wanted else ""
    current: list[str] = []
    counts: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        header = re.match(r"\s*(\[\[?)([^\[\]]+)\]\]?\s*(#.*)?$", line)
        if header:
            current = [part.strip() for part in header[2].split(".")]
            if header[1] == "[[":
                counts[current[0]] = counts.get(current[0], -1) + 1
            if current[0] in counts:
                current.insert(1, str(counts[current[0]]))
            if current == wanted:
                return number
        elif current == section and re.match(rf"\s*[\"']?{re.escape(key)}[\"']?\s*[=:]", line):
            return number
    return None


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None and item != {}}
    return value
