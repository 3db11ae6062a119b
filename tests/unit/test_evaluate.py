"""The evaluation report: numbers, and a page that needs nothing but itself."""

import json
import re
from html.parser import HTMLParser

import pytest

from wantrain.pages import html


class Links(HTMLParser):
    """Everything that a page would fetch."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found += [value for key, value in attrs if key in ("src", "href", "data", "poster")]


def test_the_report_is_self_contained_and_its_numbers_are_in_json(wantrain, tmp_path):
    for verb in ("train", "export", "evaluate"):
        assert wantrain(verb, "evaluate.seeds=[0,1]", "validation.every_steps=2") == 0
    run = tmp_path / "run"
    numbers = json.loads((run / "report.json").read_text())
    distances = numbers["style_distance"]
    assert {"base", "lora_with_trigger", "lora_without_trigger", "floor"} <= distances.keys()
    assert all(0 <= distances[k] <= 1 for k in ("base", "lora_with_trigger", "lora_without_trigger", "floor"))
    assert distances["lora_over_base"] == distances["lora_with_trigger"] / distances["base"]
    losses = numbers["validation_loss"]
    assert losses["base"] != losses["lora"]
    assert len(losses["lora_by_sigma"]) == len(losses["sigmas"]) == 9
    assert losses["sigmas"][4] == 0.75  # half of the schedule at shift 3: 3 * 0.5 / (1 + 2 * 0.5)
    assert losses["lora_minus_base"] == pytest.approx(losses["lora"] - losses["base"], abs=1e-6)
    page = (run / "report" / "report.html").read_text()
    links = Links()
    links.feed(page)
    assert len(links.found) == 6
    assert all(link.startswith("data:video/mp4;base64,") for link in links.found)
    assert not re.search(r"(url\(|@import|https?://(?!github\.com/Wan-Video))", page)
    assert f"{distances['base']:.3f}" in page
    assert "sqstyle" in page
    assert (run / "report" / "before_after.png").stat().st_size > 1000


def test_the_curve_spans_its_frame():
    lines = [{"step": s, "loss": 1.0 / s, **({"validation_loss": 0.4} if s == 3 else {})} for s in range(1, 6)]
    drawn = html.curve(lines)
    points = [tuple(map(float, p.split(","))) for p in drawn["loss"].split()]
    assert points[0] == (0.0, 0.0)
    assert points[-1] == html.CURVE_PX
    assert drawn["validation"].startswith("320.0,")
    assert html.curve(lines[:1]) == {}
