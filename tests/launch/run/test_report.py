import base64
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from launch.run.report import Comparison, write_report

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


class Page(HTMLParser):
    """Text by element, images, and every address that a browser would load."""

    def __init__(self, html: str):
        super().__init__()
        self.open, self.cells, self.images, self.addresses, self.text = [], [], [], [], ""
        self.feed(html)
        assert self.open == [], "unbalanced elements"

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "img":
            self.images.append(attributes["src"])
        elif tag != "meta":
            self.open.append(tag)
        self.addresses += [value for name, value in attributes.items() if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("th", "td", "pre", "h1", "h2", "p", "figcaption"):
            self.cells.append((self.open[-1], data))
        self.text += data


@pytest.fixture
def report(tmp_path):
    (tmp_path / "a.png").write_bytes(PIXEL)
    summary = {
        "algorithm": "hfedmoe <b>",
        "test_accuracy_final": np.float64(0.87654321),
        "expert_budget": {"phone": 3, "laptop": 16},
        "bytes_up": 12_345_678,
        "simulated_time_s": 187.4,
        "client_steps_per_s": None,
        "shares": [0.5, 0.25],
        "versions": {"jax": "0.12.0"},
    }
    sections = [("Usage & load", "What <it> shows.", tmp_path / "a.png")]
    path = tmp_path / "report.html"
    write_report(path, "Run <1>", "A & B.", summary, sections, "python -m x --config.a='<c d>'")
    return path.read_text(encoding="utf-8")


def test_holds_everything_once_and_in_order(report):
    cells = [(tag, text) for tag, text in Page(report).cells if text.strip()]
    assert cells == [
        ("h1", "Run <1>"),
        ("p", "A & B."),
        ("th", "algorithm"),
        ("td", "hfedmoe <b>"),
        ("th", "test accuracy final"),
        ("td", "0.8765"),
        ("th", "expert budget"),
        ("th", "phone"),
        ("td", "3"),
        ("th", "laptop"),
        ("td", "16"),
        ("th", "sent up"),
        ("td", "12.3 MB"),
        ("th", "simulated time"),
        ("td", "3:07 min"),
        ("th", "client steps per s"),
        ("td", "-"),
        ("th", "shares"),
        ("td", "0.5, 0.25"),
        ("h2", "Command"),
        ("pre", "python -m x --config.a='<c d>'"),
        ("h2", "Usage & load"),
        ("figcaption", "What <it> shows."),
        ("h2", "Versions"),
        ("th", "jax"),
        ("td", "0.12.0"),
    ]


def test_needs_no_other_file_and_no_network(report):
    page = Page(report)
    (image,) = page.images
    assert base64.b64decode(image.removeprefix("data:image/png;base64,")) == PIXEL
    assert page.addresses == [image]
    assert not re.search(r"https?:|url\(|@import|<script", report)


def test_adapts_to_dark_screens_and_narrow_ones(report):
    assert "prefers-color-scheme: dark" in report
    assert 'name="viewport"' in report


def test_a_table_stands_before_the_figures(tmp_path):
    (tmp_path / "a.png").write_bytes(PIXEL)
    table = Comparison("Solvers <1>", "What & why.", ("solver", "ms"), [("exact", "0.4"), ("<b>", "-")])
    sections = [("Usage", "Caption.", tmp_path / "a.png")]
    write_report(tmp_path / "r.html", "Run", "Text.", {}, sections, "command", tables=[table])
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    cells = [(tag, text) for tag, text in page.cells if text.strip()]
    assert cells[4:] == [
        ("h2", "Solvers <1>"),
        ("th", "solver"),
        ("th", "ms"),
        ("td", "exact"),
        ("td", "0.4"),
        ("td", "<b>"),
        ("td", "-"),
        ("p", "What & why."),
        ("h2", "Usage"),
        ("figcaption", "Caption."),
    ]
