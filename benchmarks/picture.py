"""The figures of a report as one SVG for the docs, in light colours.

python -m benchmarks.picture runs/campaign/report.html docs/campaign.svg
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

#: Width of the picture and the room that a figure's title takes, in the units of the figures.
WIDTH, TITLE, GAP = 980, 22, 20


def figures(html: str) -> list[tuple[str, float, float, str]]:
    """(label, width, height, content) of the figures with axes, in the order of the report."""
    found = re.findall(
        r'<svg viewBox="0 0 (\S+) (\S+)" role="img" aria-label="([^"]*)">(.*?)</svg>', html, re.S
    )
    return [(label, float(width), float(height), content) for width, height, label, content in found]


def light(css: str) -> str:
    """The rules for figures, with the variables of the first palette put in: not every viewer of SVG knows them."""
    palette = dict(re.findall(r"--(\w+): (#\w+)", css[: css.index("@media")]))
    told = css[css.index("svg {") :]
    return re.sub(r"var\(--(\w+)\)", lambda match: palette.get(match[1], match[0]), told)


def picture(html: str, css: str) -> str:
    """Figures from left to right in rows, as many as fit."""
    x, y, tall, parts = GAP, GAP, 0.0, []
    for label, width, height, content in figures(html):
        if x + width > WIDTH:
            x, y, tall = GAP, y + tall + TITLE + GAP, 0.0
        parts.append(
            f'<text class="name" x="{x}" y="{y + 12}">{label}</text>'
            f'<svg x="{x}" y="{y + TITLE}" width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
            f"{content}</svg>"
        )
        x, tall = x + width + GAP, max(tall, height)
    height = y + tall + TITLE + GAP
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}">'
        f"<style>{light(css)}\n.page {{ fill: #fff; }}</style>"
        f'<rect class="page" width="{WIDTH}" height="{height:g}"/>{"".join(parts)}</svg>\n'
    )


def main() -> None:
    report, target = map(Path, sys.argv[1:])
    html = report.read_text(encoding="utf-8")
    target.write_text(picture(html, html[html.index("<style>") : html.index("</style>")]), encoding="utf-8")


if __name__ == "__main__":
    main()
