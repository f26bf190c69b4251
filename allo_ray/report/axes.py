"""Linear and logarithmic scales, round ticks, and the frame that a figure is drawn in.

Coordinates are SVG units; a figure about 350 units wide shows at its natural size in a column of the page.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from allo_ray.report.markup import Markup, el, join


@dataclass(frozen=True)
class Scale:
    """Maps the values [low, high] to the coordinates [start, stop]; values outside are pinned to the ends."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (
            math.log(x) if self.log else x for x in (self.low, self.high, max(value, self.low))
        )
        share = (value - low) / (high - low) if high > low else 0.5
        return self.start + min(1.0, max(0.0, share)) * (self.stop - self.start)


def ticks(low: float, high: float, about: float = 5) -> list[float]:
    """Round values inside [low, high], 1, 2 or 5 times a power of ten apart."""
    if not high > low:
        return [low]
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def limits(values: Sequence[float], include: Sequence[float] = ()) -> tuple[float, float]:
    """The span of the finite values and of `include`, with a margin of 6 %; never empty."""
    finite = [value for value in (*values, *include) if math.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def plain(value: float) -> str:
    """A tick's label: no needless digits, a real minus sign."""
    text = f"{value:.1e}" if value and not 1e-3 <= abs(value) < 1e6 else f"{value:.6g}"
    return text.replace("-", "−")


@dataclass(frozen=True)
class Frame:
    """The plotting area of a figure and its scales."""

    width: float
    height: float
    x: Scale
    y: Scale

    @classmethod
    def make(
        cls,
        x: tuple[float, float],
        y: tuple[float, float],
        width: float = 350,
        height: float = 190,
        left: float = 46,
        bottom: float = 34,
        top: float = 10,
        right: float = 12,
        log_y: bool = False,
    ) -> Frame:
        return cls(width, height, Scale(*x, left, width - right), Scale(*y, height - bottom, top, log=log_y))

    def axes(
        self,
        x_label: str,
        x_ticks: Sequence[float],
        y_ticks: Sequence[float],
        x_text: Callable[[float], str] = plain,
        y_text: Callable[[float], str] = plain,
    ) -> Markup:
        """Grid lines, tick labels and the label of the x axis."""
        left, right, base, top = self.x.start, self.x.stop, self.y.start, self.y.stop
        parts = [
            el("path", d=f"M{left:.1f} {self.y(tick):.1f}H{right:.1f}", class_="grid") for tick in y_ticks
        ]
        parts += [
            el("text", y_text(tick), x=left - 6, y=self.y(tick) + 3.5, class_="tick end") for tick in y_ticks
        ]
        parts += [
            el("text", x_text(tick), x=self.x(tick), y=base + 15, class_="tick mid") for tick in x_ticks
        ]
        parts.append(el("path", d=f"M{left:.1f} {base:.1f}H{right:.1f}", class_="axis"))
        parts.append(el("text", x_label, x=(left + right) / 2, y=base + 30, class_="tick mid"))
        assert top <= base
        return join(parts)

    def line(self, xs: Sequence[float], ys: Sequence[float], class_: str) -> Markup:
        """A polyline that breaks where a value is not finite."""
        path, pen = [], "M"
        for x, y in zip(xs, ys, strict=True):
            if math.isfinite(y):
                path.append(f"{pen}{self.x(x):.1f} {self.y(y):.1f}")
                pen = "L"
            else:
                pen = "M"
        return el("path", d="".join(path), class_=class_)

    def rule_y(self, value: float, text: str, at_left: bool = False) -> Markup:
        """A dashed horizontal line with its meaning written at one end, above the line where there is room."""
        y = self.y(value)
        below = y - self.y.stop < 14
        x, style = (self.x.start + 4, "tick") if at_left else (self.x.stop - 2, "tick end")
        return join(
            (
                el("path", d=f"M{self.x.start:.1f} {y:.1f}H{self.x.stop:.1f}", class_="rule"),
                el("text", text, x=x, y=y + (12 if below else -4), class_=style),
            )
        )

    def rule_x(self, value: float, text: str) -> Markup:
        """A dashed vertical line with its meaning written beside its upper end."""
        x = self.x(value)
        flip = x > (self.x.start + self.x.stop) / 2
        return join(
            (
                el("path", d=f"M{x:.1f} {self.y.start:.1f}V{self.y.stop:.1f}", class_="rule"),
                el(
                    "text",
                    text,
                    x=x + (-5 if flip else 5),
                    y=self.y.stop + 10,
                    class_=f"tick {'end' if flip else ''}",
                ),
            )
        )

    def svg(self, *parts: object, label: str) -> Markup:
        return svg(self.width, self.height, *parts, label=label)


def svg(width: float, height: float, *parts: object, label: str, class_: str | None = None) -> Markup:
    """An inline figure that scales with its column; `label` is read to those who do not see it."""
    box = f"0 0 {width:g} {height:g}"
    return el("svg", *parts, viewBox=box, role="img", aria_label=label, class_=class_)
