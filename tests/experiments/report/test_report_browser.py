"""The report's page in a real browser: drawn, answering, quiet, at home on a phone, deaf to what rows would have it do."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from mixkv.experiments.report import page as pages
from mixkv.experiments.report.summary import short

from .browser import Browser, find
from .make_results import Row, make
from .test_report import FIGURES, HOSTILE, hostile_rows, report_of

DESKTOP, PHONE, SMALL = (1280, 800), (390, 844), (360, 740)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    find()
    with Browser() as found:
        yield found


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return make()


@pytest.fixture(scope="module")
def page(rows: list[Row], tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("report") / "report.html"
    file.write_text(pages.page(report_of(rows)), encoding="utf-8")
    return file


def opened(browser: Browser, page: Path, size: tuple[int, int] = DESKTOP) -> Browser:
    """The page, just opened in light colours; what was said and asked for before is forgotten."""
    browser.look(*size, mobile=size != DESKTOP)
    browser.driver.get("about:blank")
    browser.console(), browser.asked_for()
    browser.open(page)
    return browser


@pytest.fixture(scope="module")
def desktop(browser: Browser, page: Path) -> Browser:
    """One that all tests go on with that use nothing else."""
    return opened(browser, page)


MARKS = """
const marks = {};
for (const plot of document.querySelectorAll(".plot")) {
  marks[plot.dataset.figure] = plot.querySelectorAll("svg .role-mark path[d], svg .role-mark text").length;
}
return marks;"""

# How far the page is wider than the window, and what stands out of it but within a box of its own.
FITS = """
const out = [...document.querySelectorAll("main *, header *")].filter((element) => {
  const box = element.getBoundingClientRect();
  return box.width && (box.right > innerWidth + 1 || box.left < -1) && !element.closest(".scroll, svg");
});
return [document.documentElement.scrollWidth - innerWidth, ...out.map((element) => element.outerHTML.slice(0, 80))];"""

DRAWINGS = "return [...document.querySelectorAll('.plot svg .root')].map((drawing) => drawing.innerHTML).join()"

COLOURS = """
const seen = new Set();
const parts = [".role-mark", ".role-axis", ".role-legend"].map((part) => `.plot svg ${part} *`).join();
for (const element of document.querySelectorAll(parts)) {
  for (const name of ["fill", "stroke"]) seen.add(element.getAttribute(name));
}
const style = getComputedStyle(document.body);
return [style.backgroundColor, style.color, [...seen].filter((colour) => !/url/.test(colour)).sort().join(" ")];"""


def test_all_figures_are_drawn_and_nothing_is_said_or_asked_for(desktop: Browser, page: Path) -> None:
    marks = desktop.js(MARKS)
    assert set(marks) == set(FIGURES) and all(count > 3 for count in marks.values()), marks
    assert marks["heads"] >= 270 and marks["bits"] >= 16
    assert desktop.console() == []
    assert desktop.asked_for() == [page.as_uri()]


def choose(browser: Browser, selector: str, label: str) -> None:
    """Choose an option by its text, as a person would."""
    browser.js(
        """const select = document.querySelector(arguments[0]);
        select.selectedIndex = [...select.options].findIndex((option) => option.textContent === arguments[1]);
        select.dispatchEvent(new Event("change", {bubbles: true}));""",
        selector,
        label,
    )


@pytest.mark.parametrize(
    ("figure", "name", "label"),
    [
        ("pareto", "measure", "99.9 %"),
        ("distribution", "", "k8v8"),
        ("heads", "", "k8v8"),
        ("heads", "part", "values alone"),
        ("mass", "", "tiny"),
        ("window-layers", "", "alice.txt"),
        ("needles", "task", "multikey"),
        ("needles", "", "f16"),
    ],
)
def test_a_choice_changes_its_figure(desktop: Browser, figure: str, name: str, label: str) -> None:
    drawing = f"document.querySelector('#plot-{figure} svg .root')?.innerHTML"
    before = desktop.js(f"return {drawing}")
    choose(desktop, f"select[data-figure='{figure}'][data-param='{name}']", label)
    desktop.until(f"return {drawing} && {drawing} !== {json.dumps(before)}")
    assert desktop.js(MARKS)[figure] > 3
    if figure == "distribution":
        desktop.until(f"return document.getElementById('worst-policy').textContent === {json.dumps(label)}")
    assert desktop.console() == []


def test_worst_predictions_stand_in_their_text(desktop: Browser) -> None:
    cells = "[...row.cells].map((cell) => cell.innerText)"
    rows = desktop.js(f"return [...document.querySelectorAll('#worst tbody tr')].map((row) => {cells})")
    assert len(rows) == 12 and float(rows[0][1]) >= float(rows[1][1])
    assert desktop.js("return document.querySelectorAll('#worst mark').length") == 12


def test_texts_stand_side_by_side_up_to_where_they_part(desktop: Browser, rows: list[Row]) -> None:
    choose(desktop, "#texts-left", "k8v8")
    choose(desktop, "#texts-right", "k8v8")
    assert "tokens are the same" in desktop.js("return document.getElementById('texts-same').textContent")
    assert desktop.js("return document.querySelectorAll('.side mark').length") == 0
    choose(desktop, "#texts-left", "reference")
    choose(desktop, "#texts-right", "k2v2")
    row = next(row for row in rows if row.get("spec") == "k2v2" and row["document"] == "topics")
    both = row["reference_continuation"], row["continuation"]
    shown = [
        desktop.js(f"return document.getElementById('texts-{side}-text').textContent") for side in ("left", "right")
    ]
    assert shown == [said["text"] for said in both]
    parting = desktop.js("return [...document.querySelectorAll('.side mark')].map((mark) => mark.textContent)")
    pairs = zip(*(said["tokens"] for said in both), strict=True)
    assert parting == list(next(pair for pair in pairs if pair[0] != pair[1]))


def test_the_table_sorts_by_any_column(desktop: Browser) -> None:
    script = """
    const headings = [...document.querySelectorAll("#all thead th")];
    const column = headings.findIndex((heading) => heading.innerText.trim() === arguments[0]);
    headings[column].querySelector("button").click();
    const rows = [...document.querySelectorAll("#all tbody tr")];
    return [rows.map((row) => row.children[column].dataset.value), headings[column].getAttribute("aria-sort")];"""
    values, sort = desktop.js(script, "mean KL")
    assert len(values) == 48 and sort == "ascending" and list(map(float, values)) == sorted(map(float, values))
    values, sort = desktop.js(script, "mean KL")
    assert sort == "descending" and list(map(float, values)) == sorted(map(float, values), reverse=True)
    values, _ = desktop.js(script, "needles")  # three policies have been asked; what is not known stands last
    assert [value == "" for value in values] == [False] * 3 + [True] * 45


def test_figures_and_rows_can_be_saved(desktop: Browser, rows: list[Row], tmp_path: Path) -> None:
    desktop.cdp("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    for name, button in {
        "mass.svg": "[data-save='svg'][data-figure='mass']", "mass.png": "[data-save='png'][data-figure='mass']",
        "results.jsonl": "#save-rows",
    }.items():  # fmt: skip
        desktop.js("document.querySelector(arguments[0]).click()", button)
        desktop.until_true(lambda name=name: (tmp_path / name).is_file() and (tmp_path / name).stat().st_size > 0)
    svg = (tmp_path / "mass.svg").read_text()
    assert "Where the attention goes" in svg and "tiny" in svg
    assert (tmp_path / "mass.png").read_bytes().startswith(b"\x89PNG")
    saved = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(saved) == len(rows) and saved[0]["kind"] == "eval"
    assert desktop.console() == []


def test_the_page_forbids_the_network_and_other_scripts(desktop: Browser) -> None:
    """What would ask for something, or run something, from within the page is stopped by the page itself."""
    script = """
    const done = arguments[arguments.length - 1];
    const image = new Image();
    const shown = new Promise((end) => { image.onerror = () => end("stopped"); image.onload = () => end("loaded"); });
    image.src = "http://127.0.0.1:9/x.png";
    const fetched = fetch("http://127.0.0.1:9/x").then(() => "loaded", () => "stopped");
    const script = document.createElement("script");
    script.textContent = "window.ran = 1";
    document.body.append(script);
    Promise.all([shown, fetched, window.ran ? "ran" : "stopped"]).then(done);"""
    desktop.asked_for()
    assert desktop.driver.execute_async_script(script) == ["stopped"] * 3
    assert desktop.asked_for() == []
    said = desktop.console()
    assert len(said) >= 3 and all("Content Security Policy" in line for line in said), said


@pytest.mark.parametrize("size", [DESKTOP, PHONE, SMALL])
def test_nothing_is_wider_than_the_window_and_colours_follow_the_system(
    browser: Browser, page: Path, size: tuple[int, int]
) -> None:
    opened(browser, page, size)
    assert browser.js(FITS) == [0]
    low = "[...document.querySelectorAll('main select, main button')].filter((e) => e.offsetHeight && e.offsetHeight < 32)"
    assert browser.js(f"return {low}.length") == 0
    light, drawn = browser.js(COLOURS), browser.js(DRAWINGS)
    browser.look(*size, dark=True, mobile=size != DESKTOP)
    browser.ready(2)
    dark = browser.js(COLOURS)
    assert light[0] == "rgb(255, 255, 255)" and all(a != b for a, b in zip(light, dark, strict=True))
    assert browser.js(FITS) == [0]
    browser.look(*size, mobile=size != DESKTOP)
    browser.ready(3)
    assert browser.js(COLOURS) == light and len(browser.js(DRAWINGS)) == pytest.approx(len(drawn), rel=0.01)
    assert browser.console() == []


@pytest.mark.parametrize("size", [DESKTOP, PHONE])
def test_a_point_shows_its_policy_and_the_command(
    browser: Browser, page: Path, rows: list[Row], size: tuple[int, int]
) -> None:
    """Under a mouse as under a finger."""
    opened(browser, page, size)
    for policy in ("f16", "k2v2", "k8v8:window=256" if size == DESKTOP else "tiny"):
        x, y = browser.js(
            """document.getElementById("plot-pareto").scrollIntoView({block: "center"});
            const points = [...document.querySelectorAll("#plot-pareto .mark-symbol path")];
            const own = points.find((p) => p.getAttribute("aria-label") === arguments[0]);
            const box = own.getBoundingClientRect();
            return [box.left + box.width / 2, box.top + box.height / 2];""",
            policy,
        )
        (browser.hover if size == DESKTOP else browser.tap)(x, y)
        chosen = "document.getElementById('details-policy').selectedOptions[0].textContent"
        browser.until(f"return {chosen} === {json.dumps(policy)}")
        commands = browser.js(
            "return [...document.querySelectorAll('#details .command code')].map((e) => e.textContent)"
        )
        own = [row["command"] for row in rows if row.get("kind") == "eval" and short(row["spec"]) == policy]
        assert commands == own and len(own) == 2
        if size == DESKTOP:
            tip = "document.querySelector('#vg-tooltip-element.visible')?.textContent"
            browser.until(f"return {tip}?.includes({json.dumps(policy)}) && {tip}.includes({json.dumps(own[0])})")
    assert browser.console() == []


def test_texts_of_rows_stay_texts(browser: Browser, tmp_path: Path) -> None:
    file = tmp_path / "hostile.html"
    file.write_text(pages.page(report_of(hostile_rows(), title=HOSTILE)), encoding="utf-8")
    opened(browser, file)
    assert browser.js("return document.title") == HOSTILE
    assert browser.js("return document.images.length") == 0
    for place in (
        "#details code",
        "#worst td",
        "#texts-prompt",
        "#texts-left-text",
        "#all tbody th",
        "h1",
        ".facts dd",
    ):
        assert "<img" in browser.js("return document.querySelector(arguments[0]).textContent", place), place
    box = browser.js(
        """const plot = document.getElementById("plot-pareto");
        plot.scrollIntoView({block: "center"});
        const box = plot.getBoundingClientRect();
        return [box.left + box.width / 2, box.top + box.height / 2];"""
    )
    browser.hover(*box)
    assert "<img" in browser.until("return document.querySelector('#vg-tooltip-element.visible')?.textContent")
    assert browser.js("return document.querySelectorAll('#vg-tooltip-element img').length") == 0
    assert all(count > 0 for count in browser.js(MARKS).values())
    assert browser.console() == [] and browser.asked_for() == [file.as_uri()]
    for size in (DESKTOP, SMALL):
        browser.look(*size)
        browser.until(f"return String((() => {{ {FITS} }})()) === '0'")


def test_a_page_of_few_rows_is_quiet_as_well(browser: Browser, tmp_path: Path) -> None:
    """One policy on one piece; without errors of means, quantiles, and deviations of speeds."""
    rows = make(1, rest=False)[:1]
    rows[0]["kld"] = {"mean": 0.01}
    bench = [row for row in make(0) if "test" in row and row["kv"] == "k4v4"]
    file = tmp_path / "few.html"
    file.write_text(pages.page(report_of([*rows, *({**row, "stddev_ts": None} for row in bench)])), encoding="utf-8")
    opened(browser, file)
    assert all(count > 0 for count in browser.js(MARKS).values())
    assert browser.console() == []


def test_without_scripts_there_are_the_numbers(browser: Browser, page: Path) -> None:
    browser.cdp("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.driver.get(page.as_uri())
        text = json.dumps(browser.cdp("DOM.getDocument", depth=-1))
    finally:
        browser.cdp("Emulation.setScriptExecutionDisabled", value=False)
    assert "without it there are only the numbers" in text and "k8v8:window=256" in text
