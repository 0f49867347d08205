"""The report as a file: whole, self-contained, and honest about what is missing."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.tools.analysis_data import FACTS, MadeUp, evaluated
from tools.analysis import figures, measurements, report, runs
from tools.analysis.sections import SECTIONS
from tools.analysis.study import Study
from tools.analysis.tables import Table, change, interval, number, percent

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Balanced(HTMLParser):
    """Raises where a tag is closed that isn't the last one opened; collects attributes and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data.replace("\u00a0", " ")


def parsed(page: str) -> Balanced:
    parser = Balanced()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


def check_self_contained(page: str) -> Balanced:
    """Nothing in it is fetched from anywhere, nor runs; every id occurs once, and what refers to one finds it."""
    found = parsed(page)
    assert "http://" not in page
    assert "https://" not in page
    assert "@import" not in page
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _, _ in found.attributes}
    ids = [value for _, name, value in found.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    for tag, name, value in found.attributes:
        if name in ("src", "href", "xlink:href", "srcset"):
            assert value.startswith("#"), (tag, name, value)
            assert value[1:] in ids, (tag, name, value)
        assert not name.startswith("on")
        for target in re.findall(r"url\(([^)]*)\)", value):
            assert target.removeprefix("#") in ids
    return found


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> report.Report:
    data = MadeUp(
        tmp_path,
        [
            evaluated(runs.original(), 16, 100.0),
            evaluated(runs.dmoe(0.6), 15, 25.0),
            evaluated(runs.des_vote(0.1), 9, 25.0),
        ],
    )
    monkeypatch.setattr(report, "Data", lambda _study: data)
    return report.build(data.study)


def test_nothing_run_yet_is_said_section_by_section(tmp_path: Path) -> None:
    study = Study(model=None, base=None, out=tmp_path / "new", n=5)
    empty = report.build(study)
    report.write(empty)
    assert set(empty.missing) == {section.name for section in SECTIONS}
    page = check_self_contained((tmp_path / "new" / "report.html").read_text())
    for section in SECTIONS:
        assert section.title in page.text
        assert f"--only {section.name}" in page.text
    assert not re.search(r"\d %", page.text.split("Limits")[0].replace("95 %", "")), "a number that nobody measured"
    numbers = json.loads((tmp_path / "new" / "report.json").read_text())
    assert all(section["numbers"] == {} and section["tables"] == [] for section in numbers["sections"].values())


def test_the_page_needs_nothing_else(made: report.Report) -> None:
    report.write(made)
    page = check_self_contained((made.study.out / "report.html").read_text())
    labels = [value for tag, name, value in page.attributes if (tag, name) == ("svg", "aria-label")]
    assert len(labels) == len(made.drawn) >= 3
    assert all(len(label) > 40 for label in labels)
    assert ("meta", "name", "viewport") in page.attributes
    assert "prefers-color-scheme: dark" in page.text
    assert "This is a tiny model (7.0 million parameters) on generated arithmetic" in page.text
    for figure in made.drawn:
        assert (made.study.out / "figures" / f"{figure.name}.svg").read_text().startswith("<?xml")
        assert (made.study.out / "figures" / f"{figure.name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_headline_says_what_was_saved_and_kept(made: report.Report) -> None:
    (text,) = made.headline
    assert "25.0 experts per block and layer instead of 100.0: 75.0 % fewer" in text
    assert "keeps 93.75 % of the accuracy (80.0 % to 75.0 %, 20 problems, paired)" in text
    bound = made.numbers["tiny-arithmetic"]["strict"]["kept"]["lower_bound"]
    assert f"at least {100 * bound:.2f} % with 95 % confidence" in text


def test_the_json_says_when_and_on_what_each_measurement_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(measurements.MEASUREMENTS, "masking", lambda _study: {"token": [], "block": []})
    study = Study(model=None, base=None, out=tmp_path, n=5)
    made = measurements.ensure(study, "masking")
    found = report.as_dict(report.Report(study, [], [], {}, [], []))["measurements"]
    assert found == {"masking": {"date": made["date"], "machine": measurements.machine()}}


def test_a_large_model_is_not_called_tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {**FACTS, "parameters": 16_000_000_000}
    data = MadeUp(tmp_path, [], {"model": {"base": facts, "distilled": facts}})
    monkeypatch.setattr(report, "Data", lambda _study: data)
    monkeypatch.setattr(report, "_facts", lambda _data: [])
    text = report.build(data.study).limits[0]
    assert "a model (16,000.0 million parameters)" in text
    assert "tiny model" not in text


def test_markdown_and_json_have_the_same_tables(made: report.Report, tmp_path: Path) -> None:
    report.write(made, tmp_path / "docs.md")
    text = (tmp_path / "docs.md").read_text()
    assert text == (made.study.out / "tables.md").read_text()
    sections = json.loads((made.study.out / "report.json").read_text())["sections"]
    found = [table for section in sections.values() for table in section["tables"]]
    assert len(found) >= 5
    for table in found:
        assert f"**{table['caption']}**" in text
        for row in table["rows"]:
            assert " | ".join(row[1:]) in text


def test_a_figure_takes_the_pages_colour_and_its_own_ids() -> None:
    drawn = []
    for name in ("one", "two"):
        with figures.panels(2) as (figure, (left, right)):
            left.plot([1, 2], [3, 4], label="line")
            left.legend()
            right.scatter([1], [2])
            drawn.append(figures.finish(figure, name, "A caption.", "What is to be <seen>."))
    page = "".join(one.as_html() for one in drawn)
    check_self_contained(page)
    assert figures.INK not in page
    assert "currentColor" in page
    assert 'aria-label="What is to be &lt;seen&gt;."' in page
    assert drawn[0].svg != drawn[1].svg


def test_a_table_escapes_and_marks() -> None:
    table = Table("A & B", ("x", "y|z", "paper"), [["<a>", "1", "2"], ["b", "3", "4"]], frozenset({1}), 2, ["note <n>"])
    page = parsed(table.as_html())
    assert "<a>" in page.text
    assert "note <n>" in page.text
    assert ("tr", "class", "ours") in page.attributes
    assert page.attributes.count(("td", "class", "paper")) == 2
    lines = table.as_markdown().splitlines()
    assert lines[2:6] == ["| x | y\\|z | paper |", "|---|---:|---:|", "| <a> | 1 | 2 |", "| **b** | 3 | 4 |"]


def test_rows_as_wide_as_their_table() -> None:
    with pytest.raises(ValueError, match="2 cells; the table has 3 columns"):
        Table("t", ("a", "b", "c"), [["1", "2"]])


def test_numbers_as_people_read_them() -> None:
    assert number(1.25, 1) == "1.2"
    assert number(None) == percent(None) == "–"
    assert percent(0.99551, 2) == "99.55 %"
    assert interval(0.1, 0.25) == "10.0 to 25.0"
    assert change(25, 100) == "−75.0 %"
    assert change(150, 100) == "+50.0 %"
