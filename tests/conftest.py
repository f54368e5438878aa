"""Tiny real models and data: a two-minute suite needs no download."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadFileScheduling

from cotune.shared.chain import SignedHead, head_message
from cotune.shared.job import Job
from cotune.shared.jobfile import parse_job
from cotune.shared.signing import public_key_line, sign

WORDS = (
    "fever",
    "cough",
    "heart",
    "skin",
    "eye",
    "lung",
    "bone",
    "tooth",
    "pain",
    "rash",
    "blood",
    "vessel",
    "chronic",
    "acute",
    "left",
    "right",
    "upper",
)
LABELS = ("cardio", "derma", "pulmo")
MakeJob = Callable[..., Job]


def pytest_configure() -> None:
    """One thread a process, also in those that tests start: they run beside each other, on machines of any speed."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["COTUNE_FOOTPRINT"] = "0"  # measured in the tests that are about it
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in the background: children would not hear it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    settings.register_profile("any speed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("any speed")


class Stories(LoadFileScheduling):
    """A file's tests stay together on a worker, and those of a federation, which are one story in many files."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::", 1)[0]
        return file.rpartition("/")[0] if "/deployed/" in file else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Stories | None:
    """With `--dist loadfile`, what is said above; else as pytest-xdist does it."""
    return Stories(config, log) if config.getoption("dist") == "loadfile" else None


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's caches."""
    if "COTUNE_TEST_SHARED_CACHE" not in os.environ:
        monkeypatch.setenv("COTUNE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True)
def _one_warm_model() -> Iterator[None]:
    """Each test starts without a warm model of another."""
    yield
    import sys

    for name, function in (
        ("cotune.shared.warm", "_load"),
        ("cotune.client.answering", "_trainer"),
        ("cotune.simulations.scenario", "_pool"),
    ):
        if name in sys.modules:
            getattr(sys.modules[name], function).cache_clear()


def _tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = ["[UNK]", "[CLS]", "[SEP]", "<end>", *WORDS, *LABELS, "Diagnosis", "Specialty", ":", "."]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        eos_token="<end>",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )
    fast.save_pretrained(folder)


@pytest.fixture(scope="session")
def sign_head() -> Callable[[str, int], SignedHead]:
    """Ledger heads as sites sign them: the same site and number always give the same head."""
    keys: dict[str, Ed25519PrivateKey] = {}

    def sign_as(site: str, seq: int) -> SignedHead:
        key = keys.setdefault(site, Ed25519PrivateKey.generate())
        sha256 = hashlib.sha256(f"{site} {seq}".encode()).hexdigest()
        signature = sign(key, "cotune-head", head_message(site, seq, sha256))
        public = public_key_line(key.public_key())
        return SignedHead(site=site, seq=seq, sha256=sha256, public_key=public, signature=signature)

    return sign_as


@pytest.fixture
def mount_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a file system of that many KiB, for tests in which it fills up."""
    folder = tmp_path / "disk"

    def mount(kib: int) -> Path:
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)]
        if sys.platform != "linux" or os.geteuid() != 0 or subprocess.run(command, check=False).returncode:
            pytest.skip("only root may mount a small disk")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="session")
def tiny_causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of four layers with a word tokenizer: no padding token, no chat template."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny-causal")
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    _tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of two layers with a word tokenizer."""
    import torch
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("tiny-encoder")
    torch.manual_seed(8)
    config = BertConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    BertModel(config).save_pretrained(folder)
    _tokenizer(folder)
    return folder


def rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Made-up diagnoses: the label follows from the words, so that it can be learnt."""
    made: list[dict[str, Any]] = []
    for i in range(start, start + count):
        label = LABELS[i % len(LABELS)]
        sign = {"cardio": "heart blood", "derma": "skin rash", "pulmo": "lung cough"}[label]
        text = f"{WORDS[i % 7]} {sign} {WORDS[(i * 5) % 17]} {WORDS[(i * 3) % 11]}"
        made.append({"prompt": f"Diagnosis: {text}. Specialty:", "completion": f" {label}", "label": label})
    return made


def write_rows(path: Path, made: list[dict[str, Any]]) -> Path:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return path


@pytest.fixture
def make_job(tiny_causal: Path, tmp_path: Path) -> MakeJob:
    """A small completion job over three sites; settings are given as section=dict."""
    write_rows(tmp_path / "train.jsonl", rows(90))
    write_rows(tmp_path / "eval.jsonl", rows(30, start=1000))

    def make(**sections: dict[str, Any]) -> Job:
        settings: dict[str, dict[str, Any]] = {
            "run": {"name": "tiny", "seed": 3, "rounds": 2},
            "model": {"base": str(tiny_causal), "max_length": 32},
            "lora": {"r": 2, "alpha": 4.0, "last_layers": 2},
            "data": {"train": str(tmp_path / "train.jsonl"), "records_per_site": 30},
            "train": {"batch_size": 10, "local_steps": 2, "learning_rate": 0.5, "microbatch": 4},
            "privacy": {"epsilon": 8.0},
            "federation": {"sites": 3},
            "eval": {"data": str(tmp_path / "eval.jsonl")},
            "simulation": {"workers": 2, "threads": 1},
        }
        for section, changes in sections.items():
            settings[section] = {**settings.get(section, {}), **changes}
        return parse_job({"schema": 1, **settings}, origin="test")

    return make
