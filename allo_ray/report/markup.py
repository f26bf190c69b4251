"""HTML and SVG elements that escape by default: only `Markup` goes into the page as it is."""

from __future__ import annotations

import html
from collections.abc import Iterable

#: Characters that hide or reorder text: shown by name, so that a response cannot disguise itself.
_HIDDEN = {
    code: f"‹U+{code:04X}›"
    for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0xFEFF)
}
_CONTROLS = {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"} | {0x7F: "\u2421"}
_UNPRINTABLE = dict.fromkeys((*range(0x80, 0xA0), *range(0xD800, 0xE000), 0xFFFE, 0xFFFF), "\ufffd")
_VISIBLE = _HIDDEN | _CONTROLS | _UNPRINTABLE

#: Elements that have no end tag in HTML.
_VOID = frozenset({"meta", "br", "hr", "col"})


class Markup(str):
    """Text that is already HTML."""

    __slots__ = ()


def escape(text: object) -> Markup:
    """Any text as HTML, safe between tags and inside a quoted attribute; control characters become visible."""
    return text if isinstance(text, Markup) else Markup(html.escape(str(text).translate(_VISIBLE)))


def join(parts: Iterable[object], separator: str = "") -> Markup:
    return Markup(separator.join(escape(part) for part in parts))


def el(tag: str, *children: object, **attributes: object) -> Markup:
    """An element. `class_` is class, other underscores are hyphens, None leaves an attribute out."""
    told = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(number(value) if isinstance(value, float) else value)}"'
        for name, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{tag}{told}>" if tag in _VOID else f"<{tag}{told}>{join(children)}</{tag}>")


def number(value: float) -> str:
    """A coordinate: at most two decimals, no trailing zeros."""
    return f"{value:.2f}".rstrip("0").rstrip(".") or "0"
