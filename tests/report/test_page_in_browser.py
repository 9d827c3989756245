"""Reports in headless Chromium: no error, no request, nothing wider than the page, no picture taller than a screen.

``apt-get install chromium`` and the package playwright, of the extra ``test``, are needed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import fastprune as fp
from fastprune.report.log import read_runs
from fastprune.report.pictures import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium"),
]

HEADS = {"one": "70 % of the MACs", "several": "3 runs", "deep": "70 % of the MACs", "deep_several": "2 runs"}

TALL = """[...document.querySelectorAll('svg, img, figure, .bars, .tiles')]
    .map(e => e.getBoundingClientRect().height).reduce((a, b) => Math.max(a, b), 0)"""

SMALL_TEXT = """[...document.querySelectorAll('svg text')].filter(e => e.getClientRects().length)
    .map(e => e.getBoundingClientRect().height).reduce((a, b) => Math.min(a, b), 99)"""

# Contrast of WCAG between the texts' colours and what is behind them.
CONTRAST = """() => {
    const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
        .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b };
    const behind = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
        if (!c.startsWith('rgba(0, 0, 0, 0')) return c } return 'rgb(255, 255, 255)' };
    let worst = 99;
    for (const e of document.querySelectorAll('p, h1, h2, td, th, li, small, b, summary, pre, figcaption, svg text')) {
        const style = getComputedStyle(e), colour = e.tagName == 'text' ? style.fill : style.color;
        const [a, b] = [light(colour), light(behind(e))].sort((x, y) => y - x);
        worst = Math.min(worst, (a + .05) / (b + .05));
    }
    return worst }"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def write_run(folder: Path, model: str, budget: str, **extra: Any) -> Path:
    """Write a run with a search of three epochs and a fine-tuning of two, for a real plan of a network."""
    torch.manual_seed(0)
    result = fp.prune(fp.models.create(model), torch.zeros(1, 3, 32, 32), method="l1", budget=budget, out=folder)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    data = "imagefolder:/a/very/long/path/" + "folder/" * 12
    config |= {"model": model, "data": data, "method": "dmc", "dmc": {"epochs": 3}, **extra}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "finetune.yaml").write_text(yaml.safe_dump({"epochs": 2, "lr": 0.1}))
    keep = {f"keep/{name}": 0.5 for name in result.plan.groups}
    lines = [
        {"stage": "search", "phase": "gates", "epoch": n, "step": 9 * n + 9, "regulariser": 1 / (n + 1),
         "flops_ratio": 1 - n / 9, "proxy_accuracy": 0.5 + n / 9, **keep}
        for n in range(3)
    ]  # fmt: skip
    lines += [{"stage": "plan", "search": {"gated_part": 0.9}}]
    lines += [
        {"stage": "finetune", "phase": "train", "epoch": n, "step": 9 * n + 9, "loss": 1 / (n + 1),
         "held_out_accuracy": 0.5 + n / 10}
        for n in range(2)
    ]  # fmt: skip
    lines += [
        {"stage": "result", "method": "dmc", "baseline": {"accuracy": 0.9}, "compact": {"accuracy": 0.5}},
        {"stage": "result", "method": "finetune", "compact": {"accuracy": 0.88}},
    ]
    with (folder / "metrics.jsonl").open("a") as log:
        log.writelines(json.dumps(line) + "\n" for line in lines)
    return folder


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return reports of a small network, of several runs, and of a network with 120 layers."""
    folder = tmp_path_factory.mktemp("runs")
    small = [str(write_run(folder / f"resnet-{n}", "resnet20", f"flops=0.{n}")) for n in (7, 5, 3)]
    deep = [str(write_run(folder / f"densenet-{n}", "torchvision:densenet121", f"flops=0.{n}")) for n in (7, 5)]
    chosen = {"one": small[:1], "several": small, "deep": deep[:1], "deep_several": deep}
    for name, runs in chosen.items():
        write_report(read_runs(runs), folder / "reports" / name)
    return {name: folder / "reports" / name / "index.html" for name in chosen}


@pytest.mark.parametrize("name", ["one", "several", "deep", "deep_several"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
def test_the_page(
    name: str, scheme: str, width: int, pages: dict[str, Path], browser: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    alone = tmp_path_factory.mktemp("mailed") / "report.html"  # the page without its folder
    alone.write_bytes(pages[name].read_bytes())
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said: list[str] = []
    try:
        tab = context.new_page()
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda request: said.append(request.url))
        tab.goto(alone.as_uri())
        assert [text for text in said if not text.startswith("data:")] == [alone.as_uri()]
        assert tab.evaluate("document.documentElement.scrollWidth") == width
        assert 100 < tab.evaluate(TALL) <= 1200
        assert tab.evaluate(SMALL_TEXT) >= 7.5
        assert tab.evaluate(CONTRAST) >= 4.5
        ids = tab.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
        assert len(ids) == len(set(ids))
        pictures = tab.evaluate("[...document.querySelectorAll('svg')].map(e => e.getAttribute('aria-label'))")
        assert all(pictures)
        folded = tab.evaluate("[...document.querySelectorAll('details')].map(e => e.open)")
        assert folded
        assert not any(folded)
        tab.evaluate("document.querySelectorAll('details').forEach(e => { e.open = true })")
        assert tab.evaluate("document.documentElement.scrollWidth") == width
        assert tab.locator("h1").inner_text().startswith(HEADS[name])
        if "FASTPRUNE_SCREENSHOTS" in os.environ:
            tab.screenshot(
                path=Path(os.environ["FASTPRUNE_SCREENSHOTS"]) / f"{name}-{scheme}-{width}.png", full_page=True
            )
    finally:
        context.close()


def test_a_click_selects_the_command(pages: dict[str, Path], browser: Any) -> None:
    context = browser.new_context()
    try:
        tab = context.new_page()
        tab.goto(pages["one"].as_uri())
        tab.locator("pre").first.click()
        assert "fastprune prune" in tab.evaluate("getSelection().toString()")
        assert "--out runs/resnet-7" in tab.evaluate("getSelection().toString()")
    finally:
        context.close()
