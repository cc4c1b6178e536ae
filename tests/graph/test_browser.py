"""The page of a graph in a real browser, by mouse and by keyboard."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest

from relax_llm.graph.graph import graph_of
from relax_llm.graph.page import page
from tests.graph import browser as driver

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import relax_llm as rl
    from relax_llm.tracing.trace import Trace

pytestmark = pytest.mark.skipif(
    driver.find() is None,
    reason=f"no browser is installed: none of {', '.join(driver.PROGRAMS)} is on the PATH",
)


@pytest.fixture(scope="module")
def file(runner: rl.Runner, trace: Trace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a decode, with times."""
    path: Path = tmp_path_factory.mktemp("page") / "graph.html"
    path.write_text(page(graph_of(runner.artifact, "decode"), runner.artifact, trace), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[driver.Browser]:
    """One browser for all tests."""
    program = driver.find()
    assert program is not None
    made = driver.Browser(program, tmp_path_factory.mktemp("profile"))
    yield made
    made.close()


@pytest.fixture
def browser(started: driver.Browser, file: Path) -> Iterator[driver.Browser]:
    """It, with the page open, which must have nothing to complain of and nothing to ask of the network."""
    started.size(1300, 900)
    started.open(file)
    yield started
    assert started.problems() == []
    assert {url.partition("#")[0] for url in started.requests()} <= {file.as_uri(), "about:blank"}


ROWS = "[...document.querySelectorAll('#rows > li')].map((row) => row.dataset.key)"
FOCUSED = "(document.activeElement.closest('[data-key]') || {dataset: {}}).dataset.key"


def rows(browser: driver.Browser) -> list[str]:
    found: list[str] = browser.run(ROWS)
    return found


def test_layers_are_folded_at_first(browser: driver.Browser) -> None:
    assert rows(browser) == [
        "input token_ids",
        "node 0",
        "node 3",
        "layer layers.0",
        "layer layers.1",
        "node 18",
        "node 19",
        "output",
    ]
    assert browser.run("document.getElementById('details').hidden") is True


def test_by_mouse(browser: driver.Browser, runner: rl.Runner) -> None:
    browser.click('[data-key="layer layers.1"] button')
    inside = [f"node {index}" for index in range(10, 18)]
    assert rows(browser)[5:13] == inside
    assert (
        browser.run("document.querySelector('[data-key=\"layer layers.1\"] button').ariaExpanded") == "true"
    )
    browser.click('[data-key="node 11"] button')
    shown = browser.run("document.getElementById('panel').innerText")
    launch = runner.artifact.manifest.functions["decode"][11]
    assert launch.site in shown
    assert launch.kernel in shown
    assert "decode[11]" in shown
    assert "model.layers.1.self_attn.q_proj+k_proj+v_proj.weight" in shown
    assert "GFLOP/s" in shown
    assert browser.run("location.hash") == "#11"
    browser.click("#panel td .link")  # who wrote what it reads
    assert "decode[10]" in browser.run("document.getElementById('panel').innerText")
    browser.click("#close")
    assert browser.run("document.getElementById('details').hidden") is True
    browser.click("#fold")
    assert len(rows(browser)) == 8
    browser.click("#unfold")
    assert len(rows(browser)) == 8 + 16


def test_listings_open(browser: driver.Browser, runner: rl.Runner, file: Path) -> None:
    browser.open(file, "#11")
    titles = browser.run("[...document.querySelectorAll('.listing summary')].map((one) => one.textContent)")
    symbol = runner.artifact.manifest.functions["decode"][11].kernel
    kernels = runner.artifact.listings.index.kernels[symbol]
    assert sum(title.startswith("Assembly (") for title in titles) == len(kernels)
    code = "[...document.querySelectorAll('.listing')].find((one) => one.textContent.startsWith('TIR'))"
    assert browser.run(f"{code}.querySelector('pre').textContent") == ""
    browser.run(f"{code}.open = true")
    browser.wait(f"{code}.querySelector('pre').textContent")
    assert browser.run(f"{code}.querySelector('pre').textContent") == runner.artifact.listing(symbol).tir


def test_by_keyboard(browser: driver.Browser) -> None:
    browser.press("/")
    assert browser.run("document.activeElement.id") == "search"
    for letter in "layers.0 attention":
        browser.press(letter)
    found = browser.run("document.getElementById('found').textContent")
    assert found.endswith(" of 20 launches")
    assert "layer layers.0" in rows(browser)
    assert "node 5" in rows(browser), "what is found is unfolded"
    assert "node 13" not in rows(browser)
    browser.press("Enter")
    first = browser.run("document.querySelector('[aria-current]').closest('[data-key]').dataset.key")
    browser.press("Enter")
    assert browser.run("document.querySelector('[aria-current]').closest('[data-key]').dataset.key") != first
    browser.press("Escape")
    assert browser.run("document.getElementById('search').value") == ""
    browser.press("Escape")
    assert browser.run("document.getElementById('details').hidden") is True
    browser.click("#fold")
    browser.run("document.querySelector('[data-key=\"layer layers.0\"] button').focus()")
    browser.press("ArrowRight")
    assert browser.run(FOCUSED) == "layer layers.0"
    assert "node 1" in rows(browser)
    browser.press("ArrowDown")
    assert browser.run(FOCUSED) == "node 1"
    browser.press("Enter")
    assert "decode[1]" in browser.run("document.getElementById('panel').innerText")
    browser.press("ArrowLeft")
    assert browser.run(FOCUSED) == "layer layers.0"
    assert "node 1" not in rows(browser)


WIRES = """
(() => {
  const canvas = document.getElementById("rows").getBoundingClientRect();
  const boxes = [...document.querySelectorAll("#rows > li")].map((row) => {
    const box = row.firstElementChild.getBoundingClientRect();
    return { key: row.dataset.key, left: box.left - canvas.left, right: box.right - canvas.left,
             top: box.top - canvas.top, bottom: box.bottom - canvas.top };
  });
  const wires = [...document.querySelectorAll("#wires path.wire")].map((path) => {
    const length = path.getTotalLength();
    const end = path.getPointAtLength(length);
    const begin = path.getPointAtLength(0);
    return { begin: [begin.x, begin.y], end: [end.x, end.y], arrow: path.hasAttribute("marker-end"),
             cache: path.classList.contains("cache"), key: path.dataset.wire };
  });
  return { boxes, wires, width: canvas.width };
})()
"""


@pytest.mark.parametrize("size", [(1300, 900), (760, 900), (420, 700)], ids=str)
def test_wires_end_at_boxes(browser: driver.Browser, size: tuple[int, int]) -> None:
    """Every arrow points at a box and touches it, none is outside of the page, and boxes do not overlap."""
    browser.size(*size)
    browser.click("#unfold")
    browser.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    found = browser.run(WIRES)
    boxes = found["boxes"]
    for above, below in pairwise(boxes):
        assert above["bottom"] < below["top"]
    assert len(found["wires"]) > len(boxes)
    for wire in found["wires"]:
        x, y = wire["end"]
        touched = [
            box
            for box in boxes
            if box["left"] - 3 <= x <= box["right"] + 3 and box["top"] - 3 <= y <= box["bottom"] + 3
        ]
        assert len(touched) == 1, wire
        assert wire["arrow"]
        assert all(0 <= point[0] <= found["width"] for point in (wire["begin"], wire["end"]))
    assert sum(wire["cache"] for wire in found["wires"]) == 2
    assert browser.run("document.documentElement.scrollWidth <= innerWidth"), "nothing sticks out"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_dark_and_light(browser: driver.Browser, scheme: str, file: Path) -> None:
    browser.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    browser.open(file, "#11")

    def luminance(selector: str, name: str) -> float:
        color: str = browser.run(f"getComputedStyle(document.querySelector({json.dumps(selector)})).{name}")
        assert color.startswith("rgb("), f"{selector} has no {name} of its own"
        red, green, blue = (int(part) / 255 for part in color[color.index("(") + 1 : -1].split(",")[:3])
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (red, green, blue)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(selector: str, ground: str) -> float:
        one, other = luminance(selector, "color"), luminance(ground, "backgroundColor")
        return (max(one, other) + 0.05) / (min(one, other) + 0.05)

    paper = luminance("body", "backgroundColor")
    assert paper > 0.8 if scheme == "light" else paper < 0.1
    pairs = [
        ("body", "body"),
        (".symbol", ".box"),
        (".shape", ".box"),
        ("dt", "#details"),
        (".link", "#details"),
    ]
    operators = browser.run("[...document.querySelectorAll('.operator')].map((one) => one.dataset.operator)")
    assert len(set(operators)) == 6
    pairs += [(chip, chip) for chip in (f'[data-operator="{operator}"]' for operator in set(operators))]
    for selector, ground in pairs:
        assert contrast(selector, ground) >= 4.5, f"{selector}: WCAG asks for 4.5"
    browser.click("#theme")
    assert (luminance("body", "backgroundColor") > 0.5) == (scheme == "dark"), "the button turns it round"
    browser.ask("Emulation.setEmulatedMedia", features=[])


def test_everything_is_named_for_who_cannot_see(browser: driver.Browser, file: Path) -> None:
    browser.open(file, "#11")
    nodes: list[dict[str, Any]] = browser.ask("Accessibility.getFullAXTree")["nodes"]
    buttons = [node for node in nodes if node.get("role", {}).get("value") in ("button", "searchbox")]
    assert len(buttons) > 20
    assert all(node["name"]["value"].strip() for node in buttons)
    named = {node["name"]["value"] for node in buttons}
    assert {"Search launches", "Close", "Fold all", "Unfold all"} <= named
