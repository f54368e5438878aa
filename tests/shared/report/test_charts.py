from __future__ import annotations

from xml.etree import ElementTree

import matplotlib as mpl

from cotune.shared.report.charts import MAX_POINTS, Level, bytes_chart, epsilon_chart, quality_chart, thin

ROWS = [
    {
        "round": n, "accuracy": 0.5 + n / 50, "accuracy_low": 0.45, "accuracy_high": 0.7, "valid_loss": 2.0,
        "epsilon": n, "bytes_up": 1000 * n, "bytes_down": 2000 * n,
    }
    for n in range(5)
]  # fmt: skip


def test_a_drawing_has_a_name_a_description_and_text_as_text():
    chart = epsilon_chart(ROWS, 8.0)
    assert chart is not None
    root = ElementTree.fromstring(chart.svg)  # noqa: S314 - our own drawing
    assert root.tag == "svg" and root.get("role") == "img"
    assert [child.tag for child in root][:2] == ["title", "desc"]
    assert root[1].text == chart.caption
    words = ["".join(text.itertext()) for text in root.iter("text")]
    assert {"round", "epsilon spent"} <= set(words)
    assert "font-family" not in chart.svg


def test_drawings_share_no_id_and_are_drawn_alike_twice():
    charts = [quality_chart(ROWS, []), epsilon_chart(ROWS, 8.0), bytes_chart(ROWS)]
    ids = [
        e.get("id")
        for chart in charts
        if chart
        for e in ElementTree.fromstring(chart.svg).iter()  # noqa: S314 - our own drawing
        if e.get("id")
    ]
    assert len(charts) == 3 and len(ids) == len(set(ids)) > 20
    assert bytes_chart(ROWS) == bytes_chart(ROWS)


def test_each_line_of_comparison_has_its_own_stroke_and_legend():
    chart = quality_chart(ROWS, [Level("base model", 0.5), Level("$\\frac{$ _x", 0.6)])
    assert chart is not None
    assert [key.label for key in chart.legend][1:] == ["base model: 50.0 %", "$\\frac{$ _x: 60.0 %"]
    assert len({(key.colour, key.dash) for key in chart.legend}) == 3


def test_the_table_repeats_what_is_drawn():
    chart = bytes_chart(ROWS)
    assert chart is not None
    assert chart.rows[0] == ("1", "1.0 kB", "2.0 kB")
    assert len(chart.rows) == 4
    assert "sent 10.0 kB and received 20.0 kB in 4 rounds" in chart.caption


def test_a_long_run_is_thinned_to_a_page_with_both_ends_kept():
    rows = [{"round": n, "bytes_up": 1, "bytes_down": 1} for n in range(1, 5001)]
    kept = thin(rows)
    assert len(kept) == MAX_POINTS
    assert (kept[0]["round"], kept[-1]["round"]) == (1, 5000)
    chart = bytes_chart(rows)
    assert chart is not None and "5000 rounds" in chart.caption


def test_nothing_measured_gives_no_drawing():
    rows = [{"round": 1}]
    assert quality_chart(rows, []) is epsilon_chart(rows, 8.0) is bytes_chart(rows) is None


def test_drawing_leaves_the_settings_of_others_alone():
    before = dict(mpl.rcParams)
    quality_chart(ROWS, [])
    assert dict(mpl.rcParams) == before
