"""The shell of a report: one HTML file that needs no network, no script and no other file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from allo_ray.report.markup import Markup, el

STYLE = Path(__file__).with_name("report.css")
#: Nothing is loaded from anywhere and no script runs, whatever a response contains.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(title: str, top: Markup, sections: Mapping[str, tuple[str, Markup | None]]) -> str:
    """The whole file. `sections`: id -> (name in the list of contents, section or None where the run has none)."""
    shown = {key: (name, part) for key, (name, part) in sections.items() if part is not None}
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=POLICY),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", f"{title} · allo_ray"),
        el("style", Markup(STYLE.read_text(encoding="utf-8"))),
    )
    body = el(
        "body",
        top,
        el(
            "nav", *(el("a", name, href=f"#{key}") for key, (name, _) in shown.items()), aria_label="Sections"
        ),
        el("main", *(part for _, part in shown.values())),
        el("footer", "allo_ray: low-redundant alignment (ALLO, arXiv 2406.12606) on Ray"),
    )
    return "<!doctype html>\n" + el("html", head, body, lang="en") + "\n"
