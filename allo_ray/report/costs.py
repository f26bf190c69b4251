"""Sections: time of the stages, rows kept and dropped; how to run it again."""

from __future__ import annotations

import yaml

from allo_ray.report import figures
from allo_ray.report.content import ReportData
from allo_ray.report.markup import Markup, el
from allo_ray.report.parts import framed, section, table
from allo_ray.report.wording import NONE, count, duration, percent

_ROWS_CAPTION = (
    "Rows handed on, and rows that a rule removed. Look for a reason with more rows than you expect."
)


def costs(data: ReportData) -> Markup | None:
    parts = [part for part in (_times(data), _rows(data)) if part is not None]
    return section("costs", "Time and rows", *parts) if parts else None


def _times(data: ReportData) -> Markup | None:
    if not data.stages:
        return None
    ran = [stage for stage in data.stages if not stage.cached]
    longest = max((stage.seconds for stage in ran), default=0.0)
    rows: list[tuple[object, ...]] = []
    for stage in data.stages:
        if stage.cached:
            rows.append((stage.name, "", el("span", "from the store", class_="muted"), NONE))
            continue
        startup, work = duration(stage.startup_seconds), max(0.0, stage.seconds - stage.startup_seconds)
        bar = figures.bar(
            [
                (stage.startup_seconds, "bar start", f"{stage.name}: start-up {startup}"),
                (work, "bar work", f"{stage.name}: work {duration(work)}"),
            ],
            longest,
        )
        rows.append((stage.name, bar, duration(stage.seconds), startup))
    total, startup = sum(stage.seconds for stage in ran), sum(stage.startup_seconds for stage in ran)
    rows.append(("sum", "", el("b", duration(total)), el("b", duration(startup))))
    caption = (
        f"Time of each stage in this run. {percent(startup / total if total else None)} of it is start-up: "
        "Ray workers, engines and models coming up before the first row or step. Look for bars that are "
        "mostly start-up: such a stage gains nothing from more workers."
    )
    key = el("span", el("span", "start-up", class_="key s5"), " ", el("span", "work", class_="key s1"))
    return framed(caption, table(["stage", key, "time", "start-up"], rows, "bars times"))


def _rows(data: ReportData) -> Markup | None:
    if not data.counts and not data.drops:
        return None
    tables = []
    if data.counts:
        tables.append(
            el("div", table(["rows", "number"], [(name, count(n)) for name, n in data.counts.items()]))
        )
    dropped = [(reason, count(n)) for reason, n in sorted(data.drops.items(), key=lambda item: -item[1])]
    tables.append(el("div", table(["dropped, and why", "rows"], dropped or [("nothing was dropped", "0")])))
    return framed(_ROWS_CAPTION, el("div", *tables, class_="row two"))


def reproduce(data: ReportData) -> Markup:
    resolved = yaml.safe_dump(dict(data.config), sort_keys=False, allow_unicode=True, width=100)
    versions = ", ".join(f"{package} {version}" for package, version in data.versions.items())
    return section(
        "reproduce",
        "How to reproduce",
        el(
            "p",
            "The resolved config, every default spelled out, lies beside this report. It gives the same run "
            "again:",
        ),
        el("pre", f"allo align --config runs/{data.name}/config.resolved.yaml"),
        el("p", f"Made with {versions}.") if versions else "",
        el("details", el("summary", "Resolved config"), el("pre", resolved)),
    )
