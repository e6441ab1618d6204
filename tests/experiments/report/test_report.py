"""``mixkv report``: its figures, its page as text, and the command. What a browser makes of it: test_report_browser.py."""

import base64
import copy
import gzip
import hashlib
import io
import json
import re
import sys
from collections.abc import Iterator
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from mixkv import cli
from mixkv.experiments.report import figures_cost, figures_inside, figures_quality, render
from mixkv.experiments.report import page as pages
from mixkv.experiments.report.data import page_data, policy_columns, policy_rows
from mixkv.experiments.report.figures import Figure, theme
from mixkv.experiments.report.results import read
from mixkv.experiments.report.summary import summarize
from mixkv.models.errors import UsageError

from .make_results import HEADS, LAYERS, Row, bench_rows, eval_row, make, needle_rows, window_row, write

RUNNER = CliRunner()
FIGURES = [
    "pareto", "bits", "distance", "distribution", "heads", "mass", "speed", "memory", "window", "window-layers", "needles",
]  # fmt: skip
HOSTILE = "</script><img src=x onerror=\"document.title='owned'\"><!-- ' \" & {{ 7 * 7 }} \u2028"


def report_of(rows: list[Row], **options: Any) -> pages.Report:
    return pages.make(read([("rows", io.BytesIO("".join(json.dumps(row) + "\n" for row in rows).encode()))]), **options)


def hostile_rows() -> list[Row]:
    """Rows whose texts want to be markup, wherever a text may stand."""

    def poisoned(value: Any, name: str = "") -> Any:
        if isinstance(value, dict):
            return {key: poisoned(item, key) for key, item in value.items()}
        if isinstance(value, list):
            return [poisoned(item, name) for item in value]
        return HOSTILE if isinstance(value, str) and name not in ("kind", "key") else value

    rng = np.random.default_rng(0)
    rows = [eval_row(rng, "k4v4", "topics", 0), eval_row(rng, "k2v2", "topics", 0), window_row(rng, "topics")]
    rows = [poisoned(row) for row in (*rows, *needle_rows(rng, "k2v2", 1), *bench_rows(rng))]
    rows[1]["policy"] += "2"
    return rows


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return make()


@pytest.fixture(scope="module")
def report(rows: list[Row]) -> pages.Report:
    return report_of(rows)


@pytest.fixture(scope="module")
def html(report: pages.Report) -> str:
    return pages.page(report, figures_folder="figures")


# --- figures -------------------------------------------------------------------------------------------------------


def figure(report: pages.Report, name: str) -> Figure:
    return next(figure for figure in report.figures if figure.id == name)


def test_every_figure_is_there_where_the_rows_have_everything(report: pages.Report) -> None:
    assert [figure.id for figure in report.figures] == FIGURES and report.missing == []


def test_every_figure_becomes_a_picture(report: pages.Report, tmp_path: Path) -> None:
    written = render.write_files(report.figures, tmp_path / "figures")
    assert sorted(file.name for file in written) == sorted(
        f"{name}.{end}" for name in FIGURES for end in ("svg", "png")
    )
    for name in FIGURES:
        svg = (tmp_path / "figures" / f"{name}.svg").read_text()
        marks = re.findall(
            r'<g class="mark-(?:symbol|rect|line|area|text|rule) role-mark[^>]*>(.*?)</g>', svg, re.DOTALL
        )
        assert sum(mark.count("<path") + mark.count("<text") for mark in marks) > 0, name
        assert figure(report, name).title in svg
        assert "NaN" not in svg and "undefined" not in svg, name
        assert (tmp_path / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("dark", [False, True])
def test_specifications_compile_without_a_warning(
    report: pages.Report, name: str, dark: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    found = figure(report, name)
    for width in (STATIC := found.static(), {**STATIC, "width": 300}):
        render.library().vegalite_to_vega(json.dumps({**width, "config": theme(dark)}), show_warnings=True)
    assert capfd.readouterr().err == ""


def test_the_front_joins_the_best_and_every_policy_is_a_point(report: pages.Report, rows: list[Row]) -> None:
    data = [point for point in figure(report, "pareto").data[""] if point["measure"] == "mean"]
    assert len(data) == 48
    by_policy: dict[str, list[Row]] = {}
    for row in rows:
        if row.get("kind") == "eval":
            by_policy.setdefault(row["policy"], []).append(row)
    truth = {own[0]["policy"]: (own[0]["kv_bytes_per_token"], (own[0]["kld"]["mean"] + own[1]["kld"]["mean"]) / 2)
             for own in by_policy.values()}  # fmt: skip
    for point in data:
        nbytes, kl = truth[report.summaries[point["index"]].policy]
        assert (point["bytes"], point["kl"]) == (pytest.approx(nbytes, rel=1e-5), pytest.approx(kl, rel=1e-3))
        assert point["low"] < point["kl"] < point["high"]
        best = not any(b <= nbytes and k < kl or b < nbytes and k <= kl for b, k in truth.values())
        assert point["front"] == best, point


def test_bits_are_compared_where_all_else_is_the_same(report: pages.Report) -> None:
    found = figure(report, "bits")
    assert {(cell["k"], cell["v"]) for cell in found.data[""]} == {(k, v) for k in (2, 3, 4, 8) for v in (2, 3, 4, 8)}
    text = " ".join(found.text)
    assert "window 128, sinks 4, tile 64" in text and "32 of 48 policies are left out" in text


def test_at_most_eight_lines_are_drawn_by_distance(report: pages.Report) -> None:
    found = figure(report, "distance")
    assert len({row["policy"] for row in found.data[""]}) == 8
    assert "40 of 48 policies are left out" in " ".join(found.text)


def test_distances_of_pieces_are_averaged_by_their_tokens() -> None:
    rng = np.random.default_rng(0)
    rows = [eval_row(rng, text, document, 0) for text in ("k4v4", "k2v2") for document in ("topics", "alice.txt")]
    buckets = [(0.5, 10), (0.1, 30)]
    for row, (kl, tokens) in zip(rows[:2], buckets, strict=True):
        row["by_distance"] = [
            {"from": None, "to": 0, "tokens": 3, "kld": 0.0},
            {"from": 1, "to": 64, "tokens": tokens, "kld": kl},
        ]
    data = figure(report_of(rows), "distance").data[""]
    assert [row["kl"] for row in data if row["policy"] == "k4v4"] == [pytest.approx(0.2)]


def test_the_distribution_adds_up_to_all_predictions(report: pages.Report) -> None:
    for rows_ in figure(report, "distribution").data.values():
        assert sum(row["share"] for row in rows_) == pytest.approx(1, abs=2e-3)
        kls = [row["kl"] for row in rows_]
        assert kls == sorted(kls) and np.allclose(np.diff(np.log10(kls)), 0.2, atol=1e-3)


def test_local_errors_are_averaged_as_squares() -> None:
    rng = np.random.default_rng(0)
    rows = [eval_row(rng, "k4v4", document, 0) for document in ("topics", "alice.txt")]
    found = figures_inside.heads(summarize(rows))
    assert isinstance(found, Figure)
    both = np.array([row["errors"] for row in found.data["0"] if row["part"] == "both"])
    squares = [np.square(row["local_errors"]["both"]) for row in rows]
    assert both.shape == (LAYERS, HEADS) and np.allclose(both, np.sqrt(np.mean(squares, axis=0)), rtol=6e-3)


def test_worst_predictions_are_those_of_all_pieces() -> None:
    rng = np.random.default_rng(0)
    rows = [eval_row(rng, "k4v4", document, 0) for document in ("topics", "alice.txt")]
    data = page_data([], summarize(rows), {})["worst"]["0"]
    every = sorted((item["kld"] for row in rows for item in row["worst"]), reverse=True)
    assert [float(item["kld"]) for item in data] == pytest.approx(every[:12], rel=5e-3)


def test_speed_is_that_of_generating_with_one_set_of_options() -> None:
    rows = bench_rows(np.random.default_rng(0))
    others = [{**row, "threads": 1} for row in rows if row["n_depth"] == 0]
    found = figures_cost.speed([*others, *rows], [])
    assert isinstance(found, Figure)
    assert len(found.data[""]) == 25 and "5 rows of other" in " ".join(found.text) and "2 threads" in found.text[0]


def test_without_a_benchmark_speed_is_that_of_the_evaluations() -> None:
    found = figures_cost.speed([], summarize(make(3, rest=False)))
    assert isinstance(found, Figure) and len(found.data[""]) == 3 and "2,048 tokens" in found.text[0]


def test_what_fits_is_what_can_be_counted_token_by_token() -> None:
    row = {"kind": "eval", "model": "m", "policy": "p", "spec": "k4v4", "document": "d", "kld": {"mean": 0.1},
           "kv_bytes_per_old_token": 7.0, "kv_bytes_per_recent_token": 20.0, "parameters_bytes": 100, "window": 8,
           "sinks": 2, "tile": 4}  # fmt: skip
    (summary,) = summarize([row])
    for room in range(0, 900, 7):
        tokens, taken = 0, 100.0
        while taken + (step := 20.0 if tokens < 14 else 7.0) <= room:
            tokens, taken = tokens + 1, taken + step
        assert figures_cost.tokens_that_fit(summary, room) == tokens, room


@pytest.mark.parametrize(
    ("text", "nbytes"), [("8GB", 8 * 10**9), ("8 gib", 8 << 30), ("0.5MB", 500_000), ("1.5 TB", 15 * 10**11), ("9b", 9)]
)
def test_memory_is_read_with_its_unit(text: str, nbytes: int) -> None:
    assert figures_cost.parse_memory(text) == nbytes


@pytest.mark.parametrize("text", ["", "8", "GB", "-1GB", "0GB", "1e3MB", "8 XB", "8GB8", "9" * 4000 + "GB"])
def test_memory_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--memory must be above 0, and like 8GB") as caught:
        figures_cost.parse_memory(text)
    assert len(str(caught.value)) < 300


def test_a_report_says_what_is_missing_and_how_to_measure_it() -> None:
    minimal = {"kind": "eval", "model": "m", "policy": "p", "spec": "s", "document": "d", "kld": {"mean": 0.1}}
    made = report_of([minimal])
    assert made.figures == [] and len(made.missing) == len(FIGURES) - 1 + 1  # without window-layers, with the texts
    html = pages.page(made)
    commands = typer.main.get_command(cli.app)
    for missing in made.missing:
        assert missing.title in html and missing.what in html
        name, *words = missing.command.removeprefix("mixkv ").split()
        assert escape(missing.command, quote=False) in html
        known = {option for parameter in commands.commands[name].params for option in parameter.opts}
        assert {word for word in words if word.startswith("-")} <= known, missing.command


@pytest.mark.parametrize("kind", ["window-curve", "needle", "bench"])
def test_rows_of_one_other_kind_make_a_report(kind: str) -> None:
    rows = [row for row in make(1) if row.get("kind", "bench") == kind]
    made = report_of(rows)
    assert {figure.id for figure in made.figures} == {
        "window-curve": {"window", "window-layers"}, "needle": {"needles"}, "bench": {"speed"},
    }[kind]  # fmt: skip
    assert "All policies" not in pages.page(made)


def test_policies_on_other_pieces_are_pointed_out() -> None:
    rows = make(2, rest=False)
    assert "not strictly comparable" not in pages.page(report_of(rows))
    assert "not strictly comparable" in pages.page(report_of(rows[:-1]))


def test_combinations_of_other_models_are_not_compared() -> None:
    rows = make(12, rest=False)
    other = [{**row, "model": "other", "key": row["key"] + "o"} for row in rows[:4]]
    found = figures_quality.bits(summarize([*rows, *other]))
    assert isinstance(found, Figure) and len({(c["k"], c["v"]) for c in found.data[""]}) == len(found.data[""])


# --- the page ------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Tags with their attributes, and the text of scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.raw: list[tuple[dict[str, str | None], str]] = []
        self.words: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] in ("script", "style") and self.cdata_elem:
            self.raw.append((self.tags[-1][1], data))
        else:
            self.words.append(data)


def unpacked(html: str, name: str) -> str:
    packed = next(text for attributes, text in Page(html).raw if attributes.get("id") == name)
    return gzip.decompress(base64.b64decode(packed)).decode()


def test_a_page_of_48_policies_is_below_two_megabytes(html: str) -> None:
    assert len(html.encode()) < 2_000_000


def test_the_page_refers_to_nothing_outside(html: str) -> None:
    allowed = re.compile(r"#[a-z-]+|data:,|figures/[a-z-]+\.svg")
    for tag, attributes in Page(html).tags:
        assert tag not in ("iframe", "object", "embed", "img", "base", "form"), tag
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "action", "srcset", "data"):
            assert allowed.fullmatch(attributes.get(name) or "#x"), attributes


def test_scripts_and_style_are_those_that_the_policy_allows(html: str) -> None:
    page = Page(html)
    (content,) = (a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert content is not None and "unsafe-eval" not in content and "default-src 'none'" in content
    hashes = set(re.findall(r"'(sha256-[^']*)'", content))
    texts = [text for attributes, text in page.raw if "id" not in attributes]  # those with an id are data
    assert len(texts) == 3
    found = {"sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts}
    assert found == hashes


def test_the_rows_are_in_the_page(html: str, rows: list[Row]) -> None:
    found = [json.loads(line) for line in unpacked(html, "rows").splitlines()]
    assert len(found) == len(rows)
    by_key = {row.get("key"): row for row in found}
    for row in rows:
        if "key" in row:
            assert json.dumps(by_key[row["key"]]) == json.dumps(pages._rounded(row))
    worst = by_key[rows[0]["key"]]["kld"]["mean"]
    assert worst == pytest.approx(rows[0]["kld"]["mean"], rel=1e-5)


def test_the_page_has_what_readers_need(html: str, report: pages.Report) -> None:
    tags = Page(html).tags
    assert ("html", {"lang": "en"}) in tags and "<noscript>" in html
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in tags:
        if "aria-labelledby" in attributes:
            assert attributes["aria-labelledby"] in ids
        if (href := attributes.get("href") or "").startswith("#"):
            assert href[1:] in ids
    for summary in report.summaries:
        assert summary.label in html
    assert "AMD EPYC 9R14" in html and "topics (2,048 tokens" in html and "2026-11-24 15:00" in html


def test_texts_of_rows_never_become_markup() -> None:
    made = report_of(hostile_rows())
    assert {figure.id for figure in made.figures} == set(FIGURES)
    html = pages.page(made)
    page, clean = Page(html), Page(pages.page(report_of(make(2))))
    assert {tag for tag, _ in page.tags} <= {tag for tag, _ in clean.tags}
    assert not [a for _, a in page.tags if any(name.startswith("on") for name in a)]
    assert sum(tag == "script" for tag, _ in page.tags) == 4 and html.count("</script>") == 4
    assert HOSTILE not in html and HOSTILE in "".join(page.words)
    assert json.loads(unpacked(html, "data"))["policies"][0]["policy"].startswith(HOSTILE)


def test_a_title_is_text_as_well() -> None:
    html = pages.page(report_of(make(1, rest=False), title="<b>&amp;"))
    assert "<title>&lt;b&gt;&amp;amp;</title>" in html


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths to everything in a JSON value, the value itself included; of long lists the first two items."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for name, item in items:
        yield from leaves(item, (*path, name))


RNG = np.random.default_rng(0)
FEW = [*make(2, rest=False)[:3], window_row(RNG, "d"), needle_rows(RNG, "k2v2", 1)[0], bench_rows(RNG)[1]]
PATHS = [(i, *path) for i, row in enumerate(FEW) for path in leaves(row) if path]
VALUES = st.sampled_from(
    [
        None,
        True,
        0,
        -1,
        3,
        1e-300,
        1e100,
        -5.5,
        "",
        "x" * 5000,
        "\ud83d\ude00",
        [],
        [[]],
        [None],
        [1, 2],
        [[1], [2]],
        {},
        {"a": 1},
    ]
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(PATHS), VALUES), min_size=1, max_size=3))
def test_whatever_stands_in_a_field_there_is_a_report_or_one_line(changes: list[tuple[tuple[Any, ...], Any]]) -> None:
    rows = copy.deepcopy(FEW)
    for (index, *path), value in changes:
        place: Any = rows[index]
        try:
            for name in path[:-1]:
                place = place[name]
            place[path[-1]] = value
        except (KeyError, IndexError, TypeError):
            continue  # another change was made above it
    try:
        made = report_of(rows)
    except UsageError as error:
        assert "\n" not in str(error) and len(str(error)) < 600
        return
    json.dumps(page_data(made.figures, made.summaries, {}), allow_nan=False)
    json.dumps([figure.static() for figure in made.figures], allow_nan=False)


# --- the command ---------------------------------------------------------------------------------------------------


def mixkv(*arguments: object, **options: Any) -> Result:
    return RUNNER.invoke(cli.app, ["report", *map(str, arguments)], **options)


def refused(result: Result, *words: str) -> None:
    assert (result.exit_code, result.stdout) == (2, ""), (result.exit_code, result.output, result.exception)
    assert len(result.stderr.splitlines()) == 1 and all(word in result.stderr for word in words), result.stderr


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "results.jsonl", make(6))


def test_the_page_and_its_figures_are_written(file: Path, tmp_path: Path) -> None:
    result = mixkv(file, "-o", tmp_path / "my page.html")
    assert (result.exit_code, result.stderr, result.stdout) == (0, "", f"{tmp_path / 'my page.html'}\n")
    html = (tmp_path / "my page.html").read_text()
    assert html.startswith("<!doctype html>") and 'href="my%20page_figures/pareto.svg"' in html
    assert sorted(path.name for path in (tmp_path / "my page_figures").glob("*.svg")) == sorted(
        f"{f}.svg" for f in FIGURES
    )


def test_what_stands_there_is_overwritten(file: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text("old")
    assert mixkv(file, "-o", page, "--no-figures", "--title", "Of <mine>").exit_code == 0
    assert "Of &lt;mine&gt;" in page.read_text() and not (tmp_path / "report_figures").exists()


def test_several_files_and_stdin_are_read(file: Path, tmp_path: Path) -> None:
    more = write(tmp_path / "more.jsonl", bench_rows(np.random.default_rng(0)))
    text = more.read_text() + '{"kind": "ev'
    result = mixkv(file, "-", "-o", tmp_path / "r.html", "--figures", tmp_path / "f", "--memory", "2GiB", input=text)
    assert result.exit_code == 0 and (tmp_path / "f" / "memory.png").is_file()
    assert result.stderr == "mixkv: stdin:51: the last line was not written to its end, and is left out\n"
    assert "What fits in 2.147 GB" in (tmp_path / "r.html").read_text()


def test_wrong_usage_is_one_line(file: Path, tmp_path: Path) -> None:
    page = tmp_path / "r.html"
    refused(mixkv(tmp_path / "none.jsonl", "-o", page), "none.jsonl", "cannot be read", "No such file")
    refused(mixkv(tmp_path, "-o", page), "cannot be read", "directory")
    refused(mixkv(file, "-o", tmp_path / "no" / "r.html"), "--output", "there is no folder")
    refused(mixkv(file, "-o", page, "--figures", tmp_path / "no" / "f"), "--figures", "there is no folder")
    refused(mixkv(file, "-o", tmp_path), "--output", "is a folder")
    refused(mixkv(file, "-o", page, "--figures", "f", "--no-figures"), "--figures", "no effect")
    refused(mixkv(file, "-o", page, "--memory", "much"), "--memory", "'much'")
    refused(mixkv("-", "-", "-o", page), "stdin")
    refused(mixkv(write(tmp_path / "b.jsonl", [{"kind": "eval"}]), "-o", page), "b.jsonl:1", "model must be there")
    (tmp_path / "taken").write_text("")
    refused(mixkv(file, "-o", page, "--figures", tmp_path / "taken"), "--figures", "cannot be written")
    assert not page.exists()


def test_without_the_library_one_line_says_what_to_install(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    refused(mixkv(file, "-o", tmp_path / "r.html"), "pip install 'mixkv[report]'")
    assert list(tmp_path.iterdir()) == [file]


def test_needles_are_those_of_the_same_model_weights_and_policy() -> None:
    """Names of caches are no help: the same one may stand for another model's, or say more than here."""
    rng = np.random.default_rng(0)
    predictions = [eval_row(rng, "k4v4", "topics", 0), eval_row(rng, "k2v2", "topics", 0)]
    needles = [row for text in ("k4v4", "k2v2") for row in needle_rows(rng, text, 1)]
    for row in needles:
        row["correct"] = row["policy"] == predictions[0]["policy"]
    others = [{**row, "model": "another", "key": f"{i:016x}", "correct": False} for i, row in enumerate(needles)]

    def column(report: pages.Report) -> dict[str, str]:
        titles = [title for title, _ in policy_columns(report)]
        at = titles.index("needles")
        return {line["summary"].policy: line["cells"][at][1] for line in policy_rows(report)}

    found = report_of([*predictions, *needles, *others])
    assert column(found) == {predictions[0]["policy"]: "100 %", predictions[1]["policy"]: "0 %"}
    assert any("Needles were looked for with 2 caches" in note for note in pages._notes(found))
    both = [{**row, "regime": "decode", "key": f"{i + 900:016x}"} for i, row in enumerate(predictions)]
    assert column(report_of([*predictions, *both, *needles])) == column(found)
    assert not any("Needles" in note for note in pages._notes(report_of([*predictions, *needles])))
