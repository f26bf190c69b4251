"""The page: it holds the numbers it was given, survives any text, and needs nothing from outside."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from html.parser import HTMLParser

import numpy as np
import pytest

from allo_ray.report.content import Comparison, Divergence, ModelScores, Negative, ReportData
from allo_ray.report.html import finding, model_styles, render, verdict
from allo_ray.report.wording import NBSP

Build = Callable[..., ReportData]


class Page(HTMLParser):
    """Collects text and attributes, and fails on a tag that is not closed in order."""

    VOID = frozenset({"meta", "br", "hr", "col"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open, self.open
        self.text = "".join(self.texts).replace(NBSP, " ")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.texts.append(data)

    def classes(self) -> set[str]:
        return {name for _, attributes in self.tags for name in (attributes.get("class") or "").split()}


def test_the_numbers_shown_are_the_numbers_given(build_run: Build) -> None:
    """245 of 400 is 61.25 %, shown as 61.3 %; the interval, p-values, selections and rows stand in the page."""
    data = build_run()
    text = Page(render(data)).text
    assert "ALLO 61.3 % vs SFT 44.0 %, p = 0.00031" in text
    assert "+17.3 points on two-digit sums: better than SFT." in text
    assert "24 November 2026, 09:30" in text
    for score in data.models:
        assert f"{score.correct}/{score.n}" in text
        assert f"[{100 * score.low:.1f}, {100 * score.high:.1f}]" in text
    for shown in ("p = 0.11", "p < 0.0001", "p = 0.86", "+4.3", "+13.0", "+0.5"):
        assert shown in text
    for selection in data.selections.values():
        assert f"{sum(part for part, _ in selection.values()):,} of 134,515,008 neurons" in text
        part, whole = selection["model.layers.7.mlp.down_proj.weight"]
        assert f"layer 7, down_proj: {part:,} of {whole:,} neurons ({100 * part / whole:.2f} %)" in text
    for rows in (*data.counts.values(), *data.drops.values()):
        assert f"{rows:,}" in text
    assert data.kept_by_u is not None
    assert f"u = 0.95 keeps {100 * data.kept_by_u:.1f} % of 10,100 tokens" in text
    assert "878 tokens/s" in text
    # 790.9 s without the stage that came from the store.
    assert "ran 13 min 11 s" in text
    assert "from the store" in text


def test_the_distance_from_the_start_model_stands_beside_the_accuracies(build_run: Build) -> None:
    found = {
        "SFT": Divergence(0.0, 0.0, 256),
        "ALLO": Divergence(0.12345, 0.0067, 250),
        "DPO": Divergence(0.5, None, 1),
    }
    text = Page(render(build_run(divergences=found, drawn="temperature 0.7 and top_p 0.95"))).text
    assert "0.1235± 0.0067 · n 250" in text
    assert "0.5± – · n 1" in text
    assert "drawn at temperature 0.7 and top_p 0.95" in text
    assert "KL" not in Page(render(build_run())).text


def test_start_up_share_counts_only_what_ran(build_run: Build) -> None:
    """Start-up: 18+34+1.1+12+19+0.4+0.2+17+15+18+19+26 = 179.7 s of 790.9 s, that is 22.7 %."""
    text = Page(render(build_run())).text
    assert "22.7 % of it is start-up" in text
    assert "3 min 00 s" in text


def test_every_token_tells_its_own_numbers(build_run: Build) -> None:
    negative = Negative("p", None, "c", None, ["a", "b", "c"], [0.96, 0.94, 0.01], [1, 0, 1])
    tokens = [
        (attributes["class"], attributes["title"])
        for tag, attributes in Page(render(build_run(negatives=[negative]))).tags
        if tag == "span" and "title" in attributes and "tok" in (attributes.get("class") or "").split()
    ]
    assert tokens == [
        ("tok ok", "token 1\nP_re 0.9600, r = 0\nq = 1"),
        ("tok t0 d", "token 2\nP_re 0.9400, r = 1\nq = 0"),
        ("tok t4", "token 3\nP_re 0.0100, r = 1\nq = 1"),
    ]


NASTY = (
    "<script>alert(1)</script></style></title><img src=http://evil.example/x onerror=y> \"quotes\" 'more' & &amp; "
    "日本語 العربية \U0001f600 a\u0301\u0301 \u202eevil\u202c \x00\x1b[31m \ud800 \u2028 \r\n\t]]> <!-- -->"
)


def test_any_text_is_shown_and_nothing_of_it_is_obeyed(build_run: Build) -> None:
    """Every text of the input is hostile: the page's tags and their order stay the very same."""
    negative = Negative(NASTY, NASTY, NASTY, NASTY, [NASTY, "", "\n"], [0.1, 0.2, 1.0], [1, 0, 1])
    plain = dataclasses.replace(
        negative, prompt="p", reference="r", chosen="c", rewrite="w", tokens=["a", "", "b"]
    )

    def page(text: str, shown: Negative) -> Page:
        tensor = text.splitlines()[0]
        scores = [
            ModelScores(text, "suite" + text, 1, 2, 0.1, 0.9),
            ModelScores("b", "suite" + text, 1, 2, 0.1, 0.9),
        ]
        return Page(
            render(
                build_run(
                    name=text,
                    model=text,
                    config={text: {"key": text}},
                    models=scores,
                    comparisons=[Comparison(text, "b", "suite" + text, 0.1, 0.2)],
                    selections={"k1": {f"{tensor}.0.{tensor}.weight": (1, 2), tensor: (1, 2)}},
                    negatives=[shown],
                    drops={text: 1},
                    counts={text: 2},
                    versions={text: text},
                    q_model=text,
                )
            )
        )

    hostile, harmless = page(NASTY, negative), page("x", plain)
    assert [tag for tag, _ in hostile.tags if tag != "mark"] == [
        tag for tag, _ in harmless.tags if tag != "mark"
    ]
    assert "<script>alert(1)</script>" in hostile.text
    assert "日本語 العربية \U0001f600" in hostile.text
    assert "‹U+202E›evil" in hostile.text
    text = render(build_run(name=NASTY, negatives=[negative]))
    assert text.encode()
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", text)


def test_nothing_comes_from_outside(build_run: Build) -> None:
    page = Page(render(build_run()))
    for tag, attributes in page.tags:
        assert tag not in (
            "script",
            "link",
            "img",
            "iframe",
            "object",
            "embed",
            "base",
            "form",
            "image",
            "use",
        )
        assert (attributes.get("href") or "#").startswith("#")
        assert not {"src", "srcset", "xlink:href", "action", "data"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
    text = render(build_run())
    assert not re.search(r"url\(|@import|https?://", text)
    assert "default-src 'none'" in page.tags[3][1]["content"]  # type: ignore[operator]


def test_links_lead_to_sections(build_run: Build) -> None:
    for data in (build_run(), build_run(curves={}, selections={}, p_re=None, negatives=[], stages=[])):
        page = Page(render(data))
        ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
        assert len(ids) == len(set(ids))
        assert [attributes["href"] for tag, attributes in page.tags if tag == "a"] == [
            f"#{key}" for key in ids
        ]


def test_all_classes_have_a_style(build_run: Build) -> None:
    text = render(build_run())
    style = text[text.index("<style>") : text.index("</style>")]
    unstyled = {name for name in Page(text).classes() if not re.search(rf"\.{name}\b", style)}
    assert unstyled == set()


def test_an_empty_run_is_a_page(build_run: Build) -> None:
    """Nothing but a name: no SFT, no forgetting, no learning, no evaluation."""
    data = ReportData("bare", datetime(2026, 1, 2, 3, 4), "m", {}, [], [])
    text = Page(render(data)).text
    assert "No two models were compared" in text
    assert "2 January 2026, 03:04" in text


@pytest.mark.parametrize(
    "missing",
    [
        {"comparisons": []},
        {"models": []},
        {"curves": {}},
        {"selections": {"k1": {}, "k2": {}}},
        {"selections": {"k2": {"model.embed_tokens.weight": (0, 10)}}},
        {"selections": {"k1": {"model.layers.0.mlp.up_proj.weight": (0, 0)}}},
        {"p_re": np.empty(0), "u": None, "kept_by_u": None},
        {"p_re": np.array([np.nan, 1.0, 0.0]), "u": 0.0, "kept_by_u": 0.0},
        {"p_re": np.ones(5), "u": 1.0, "kept_by_u": 0.0},
        {"v": None},
        {"negatives": [Negative("p", None, "c", None, [])]},
        {"negatives": [Negative("p", None, "c", None, ["a"], [], [1])]},
        {"negatives": [Negative("p", None, "c", None, ["a"], [0.5], [])], "u": None},
        {"stages": []},
        {"drops": {}, "counts": {}},
    ],
    ids=str,
)
def test_what_a_run_does_not_have_is_left_out(build_run: Build, missing: dict[str, object]) -> None:
    text = Page(render(build_run(**missing))).text
    assert "nan" not in text.lower()


def test_stages_of_any_length(build_run: Build, build_metrics: Callable[..., object]) -> None:
    """0 and 1 step, and 5,000 steps, which are drawn by their means."""
    lengths = {"none": 0, "one": 1, "two": 2, "long": 5000}
    page = render(build_run(curves={name: build_metrics(steps, kept=0.8) for name, steps in lengths.items()}))
    text = Page(page).text
    assert "5,000 steps" in text
    assert "nan" not in text.lower()
    assert len(page.encode()) < 600_000


def test_kept_share_is_shown_only_where_tokens_are_dropped(
    build_run: Build, build_metrics: Callable[..., object]
) -> None:
    curves = {"sft": build_metrics(8, paired=False, kept=1.0), "learn": build_metrics(8, kept=0.8)}
    text = Page(render(build_run(curves=curves))).text
    assert "kept by step, learn" in text
    assert "kept by step, sft" not in text
    assert text.count("kept tokens") == 1
    assert "step 8: kept 80.00 %" in text


def test_a_large_run_stays_small(build_run: Build) -> None:
    """A model of 80 layers, long responses in a script of three bytes a letter: under 1.5 MB."""
    tokens = ["<字>"] * 3000
    long = Negative(
        "字" * 9000, "<字>" * 9000, "字" * 9000, "字句" * 9000, tokens, [0.123456] * 3000, [0.0] * 3000
    )
    selection = {
        f"model.layers.{i}.mlp.m{j}_proj.weight": (12345, 99999) for i in range(80) for j in range(12)
    }
    data = build_run(negatives=[long] * 50, selections={"k1": selection, "k2": selection})
    page = render(data)
    assert len(page.encode()) < 1_500_000
    assert "The first 20 of 50." in Page(page).text
    assert "2,600 more tokens" in Page(page).text


def test_verdict_says_plainly_what_the_first_comparison_shows(build_run: Build) -> None:
    assert finding(Comparison("a", "b", "s", 0.1, 0.01)) == ("good", "+10.0 points on s: better than b.")
    assert finding(Comparison("a", "b", "s", -0.1, 0.01)) == ("bad", "−10.0 points on s: worse than b.")
    for p in (0.05, 1.0, float("nan")):
        assert finding(Comparison("a", "b", "s", 0.1, p))[0] == "unsure"
    unknown = build_run(comparisons=[Comparison("other", "SFT", "two-digit sums", 0.1, 0.5)])
    assert verdict(unknown).replace(NBSP, " ") == "other vs SFT 44.0 %, p = 0.50"


def test_models_keep_their_colours(build_run: Build) -> None:
    styles = model_styles(build_run())
    assert styles["SFT"] == "s0"
    assert styles["ALLO"] == "s3"
    assert len(set(styles.values())) == 4


def test_same_input_same_page(build_run: Build) -> None:
    assert render(build_run()) == render(build_run())


def test_the_report_needs_neither_torch_nor_ray() -> None:
    """A client without them can draw a report; checked in a fresh interpreter."""
    code = (
        "import sys, allo_ray.report.html, allo_ray.report.campaign, allo_ray.report.terminal; "
        "print(*({'torch', 'ray', 'vllm', 'transformers'} & set(sys.modules)))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == ""
