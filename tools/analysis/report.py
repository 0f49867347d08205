"""The report: one HTML file that needs nothing else, the same tables as Markdown, all numbers as JSON."""

from __future__ import annotations

import datetime
import html
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offload_engine.evaluate.records import write_json
from offload_engine.evaluate.tasks import ARITHMETIC
from offload_engine.files import write_aside
from tools.analysis import measurements, paper
from tools.analysis.evaluations import differences, said
from tools.analysis.figures import Drawn
from tools.analysis.runs import dmoe, original
from tools.analysis.sections import SECTIONS, Section
from tools.analysis.sections.comparison import fewer
from tools.analysis.sections.content import Content, Data, MissingError
from tools.analysis.study import Study
from tools.analysis.tables import Table, number, percent, unbroken

TINY = 100_000_000
"""Parameters below which a model is called tiny."""
TITLE = "Learnable block experts: what was measured"
STYLE = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Report:
    """All sections, built or not."""

    study: Study
    facts: list[tuple[str, str]]
    """What was measured on what."""
    headline: list[str]
    numbers: dict[str, Any]
    """The headline's."""
    sections: list[tuple[Section, Content]]
    limits: list[str]

    @property
    def drawn(self) -> list[Drawn]:
        """Every figure."""
        return [part for _, content in self.sections for part in content.parts if isinstance(part, Drawn)]

    @property
    def missing(self) -> dict[str, list[str]]:
        """Section -> what it lacks; sections that lack nothing are left out."""
        return {section.name: list(content.missing) for section, content in self.sections if content.missing}


def build(study: Study) -> Report:
    """Draw and tabulate whatever has been run; what hasn't is named."""
    data = Data(study)
    sections = []
    for section in SECTIONS:
        try:
            content = section.build(data)
        except MissingError as error:
            content = Content([], missing=[str(error)])
        sections.append((section, content))
    headline, numbers = _headline(data)
    return Report(study, _facts(data), headline, numbers, sections, _limits(data))


def write(report: Report, markdown: Path | None = None) -> None:
    """Write report.html, report.json, tables.md and figures/ into the study's folder, the Markdown also to `markdown`.

    Tables, figures and JSON of one report always belong together: the HTML is written last.
    """
    out = report.study.out
    out.mkdir(parents=True, exist_ok=True)
    for figure in report.drawn:
        figure.save(out / "figures")
    write_json(out / "report.json", as_dict(report))
    text = as_markdown(report)
    for path in filter(None, (out / "tables.md", markdown)):
        write_aside(path, text.encode())
    write_aside(out / "report.html", as_html(report).encode())


def as_dict(report: Report) -> dict[str, Any]:
    """All numbers, unrounded, and the tables as they are printed."""
    return {
        "title": TITLE,
        "command": report.study.command(),
        "facts": dict(report.facts),
        "measurements": _made(report.study),
        "headline": report.numbers,
        "sections": {
            section.name: {
                "title": section.title,
                "numbers": content.numbers,
                "tables": [part.as_dict() for part in content.parts if isinstance(part, Table)],
                "missing": list(content.missing),
            }
            for section, content in report.sections
        },
        "limits": report.limits,
    }


def _made(study: Study) -> dict[str, Any]:
    """When and on what each measurement was made."""
    found = {name: measurements.load(study, name) for name in measurements.MEASUREMENTS}
    return {name: {key: one[key] for key in ("date", "machine")} for name, one in found.items() if one is not None}


def as_markdown(report: Report) -> str:
    """Text and tables; a figure is its caption."""
    lines = [f"# {TITLE}", ""]
    lines += [f"- {name}: {value}" for name, value in report.facts] + [""]
    for text in report.headline:
        lines += [text, ""]
    for section, content in report.sections:
        lines += [f"## {section.title}", ""]
        for part in content.parts:
            lines += [part.as_markdown() if isinstance(part, Table) else _words(part), ""]
        if content.missing:
            lines += [_lack(report.study, section, content), ""]
    lines += ["## Limits", "", *(f"- {text}" for text in report.limits), ""]
    return "\n".join(lines)


def _words(part: str | Drawn) -> str:
    return part if isinstance(part, str) else f"![{part.alt}](figures/{part.name}.svg)\n\n*{part.caption}*"


def as_html(report: Report) -> str:
    """The whole page."""
    links = "".join(f'<li><a href="#{one.name}">{html.escape(one.title)}</a></li>' for one, _ in report.sections)
    facts = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in report.facts)
    headline = "".join(f"<p>{_marked(text)}</p>" for text in report.headline)
    sections = "".join(_section(report.study, section, content) for section, content in report.sections)
    limits = "".join(f"<li>{_marked(text)}</li>" for text in report.limits)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{TITLE}</title><style>{STYLE}</style></head><body><header><h1>{TITLE}</h1>"
        f'<div class="headline">{headline}</div><dl>{facts}</dl></header><nav aria-label="Sections"><ol>{links}'
        '<li><a href="#limits">Limits</a></li></ol></nav><main>'
        f'{sections}<section id="limits"><h2>Limits</h2><ul>{limits}</ul></section></main>'
        f"<footer><p>Made by <code>{html.escape(report.study.command())}</code></p></footer></body></html>\n"
    )


def _section(study: Study, section: Section, content: Content) -> str:
    parts = "".join(f"<p>{_marked(part)}</p>" if isinstance(part, str) else part.as_html() for part in content.parts)
    lack = f'<p class="missing">{_marked(_lack(study, section, content))}</p>' if content.missing else ""
    return f'<section id="{section.name}"><h2>{html.escape(section.title)}</h2>{parts}{lack}</section>'


def _lack(study: Study, section: Section, content: Content) -> str:
    many = len(content.missing)
    listed = ", ".join(content.missing[:4]) + (f" and {many - 4} more" if many > 4 else "")
    other = _other_settings(study, section)
    if other:
        return (
            f"Missing: {listed}. {study.out} holds evaluations with other settings ({other}): choose another --out, or "
            "the settings they were made with"
        )
    return f"Not run yet: {listed}. To make it: `{study.command(section.name)}`"


def _other_settings(study: Study, section: Section) -> str:
    """The first evaluation of `section` that is there and differs, and by what."""
    for task in study.tasks:
        for run in section.runs(study.effort):
            found = differences(study, task, run)
            if found:
                return f"{run.name} on {task}: {said(found)}"
    return ""


def _marked(text: str) -> str:
    """Escaped, with `code` between backticks."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", unbroken(text))


def _headline(data: Data) -> tuple[list[str], dict[str, Any]]:
    """What dMoE with p = 0.6 saves and keeps, task by task."""
    lines, numbers = [], {}
    for task in data.study.tasks:
        ours, before = data.find(task, dmoe(0.6)), data.find(task, original())
        if ours is None or before is None:
            lines.append(f"{task}: dMoE and the original routing have not both been evaluated yet.")
            continue
        paired = data.against_original(task, ours)
        kept, unique = paired["strict"]["kept"], paired["unique_experts"]
        numbers[task] = paired
        text = (
            f"On {task}, dMoE with p = 0.6 uses {number(ours.unique)} experts per block and layer instead of "
            f"{number(before.unique)}: {fewer(unique['reduction']).removesuffix(' experts')}. "
        )
        if kept is None:
            text += "The original routing got nothing right, so there is no accuracy to keep."
        else:
            text += (
                f"It keeps {percent(kept['ratio'], 2)} of the accuracy ({percent(before.accuracy)} to "
                f"{percent(ours.accuracy)}, {paired['n']} problems, paired), and at least "
                f"{percent(kept['lower_bound'], 2)} with 95 % confidence."
            )
        lines.append(f"{text} The paper: {paper.EXPERTS_SAVED} % fewer, {paper.ACCURACY_KEPT} % kept.")
    return lines, numbers


def _facts(data: Data) -> list[tuple[str, str]]:
    study, facts = data.study, []
    saved = measurements.load(study, "model")
    if saved is not None:
        for role in ("distilled", "base") if study.has_base else ("distilled",):
            one = saved["result"][role]
            facts.append(
                (
                    f"{role.capitalize()} model",
                    f"{one['name']}: {one['parameters'] / 1e6:.1f} million parameters, {len(one['moe_layers'])} MoE "
                    f"layers of {one['num_experts']} experts, {one['top_k']} per token, {one['dtype']} "
                    f"({one['fingerprint']})",
                )
            )
    facts.append(("Task", ", ".join(f"{task} ({_size(data, task)})" for task in study.tasks)))
    params = study.sampling()
    decoding = (
        f"threshold {params.threshold:g}, {params.steps} steps, blocks of {params.block_length}, greedy, at most "
    )
    facts.append(("Decoding", f"{decoding}{params.max_new_tokens} new tokens, one prompt at a time"))
    if saved is not None:
        here, threads = saved["machine"], saved["result"]["distilled"]["threads"]
        facts.append(
            ("Machine", f"{here['cpu']}, {here['cores']} cores, {threads} compute thread(s), torch {here['torch']}")
        )
    facts.append(("Date", datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")))
    return facts


def _size(data: Data, task: str) -> str:
    found = data.find(task, original())
    if found is not None:
        return f"{found.summary['n']} problems"
    return "all problems" if data.study.n is None else f"{data.study.n} problems"


def _limits(data: Data) -> list[str]:
    study = data.study
    limits = [
        "The paper's numbers are LLaDA2.0-mini's (16 billion parameters) on public benchmarks; they stand beside "
        "ours to compare the shape of the results, not their size.",
        "Each evaluation is one greedy run: its intervals cover the choice of problems, not another training or "
        "another seed.",
        "Latencies are those of this CPU engine, which steps one prompt at a time, and of a machine that may have "
        "had other work; models and routings take turns in rounds, and ranges are given. They say nothing of a GPU.",
    ]
    if study.tasks == (ARITHMETIC,):
        limits.insert(
            0,
            f"This is {_model_said(data)} on generated arithmetic. The problems come from the generator that makes the "
            "built-in models' training data, with another seed; what holds here need not hold for other tasks.",
        )
    if not study.has_base:
        limits.append('No base model was given, so "base" is the same model under other routings.')
    if study.quick:
        limits.append(
            "A quick run: a handful of problems and repetitions, enough to try the tools and for nothing else."
        )
    return limits


def _model_said(data: Data) -> str:
    """The model by its size, as far as that is known."""
    try:
        parameters = data.facts("distilled")["parameters"]
    except MissingError:
        return "a model"
    return f"{'a tiny' if parameters < TINY else 'a'} model ({parameters / 1e6:,.1f} million parameters)"
