"""The report: what the page holds, what it must never hold, and how it sits in a browser."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from collections import Counter
from html import escape, unescape
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shearling.errors import ShearlingError
from shearling.report import numbers, svg, write_report
from shearling.report.plots import domain_class, domain_plot, step_plot, width_plot

SECTIONS = [
    *("headline", "quality", "sizes", "widths", "training", "cost"),
    *("samples", "loading", "engines", "recipe", "versions"),
]
HOSTILE = """</title></style></pre><script>alert(1)</script><img src=x onerror="f()">'"{{7*7}}&amp;"""
HUGE = pytest.param(10**400, id="huge")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def sizes(scale: float) -> dict[str, int]:
    return {
        "parameters": round(134_515_008 * scale),
        "bytes": round(269_030_016 * scale),
        "ffn_parameters": round(79_626_240 * scale),
        "kv_bytes_per_token": 23_040,
        "flops_per_token": round(269_000_000 * scale),
    }


def evaluated(perplexity: float, scale: float, **more: float) -> dict[str, Any]:
    counted = {key: sizes(scale)[key] for key in ("parameters", "bytes")}
    text = {"corpus": "stdlib:evaluation", "context": 1024, "stride": 1024, "tokens": 30_720}
    return {"perplexity": perplexity, **text, **counted, **more}


def plan_of(*, uniform: bool = False, num_layers: int = 30) -> dict[str, Any]:
    blocks = [
        {
            "layer": layer,
            "ffn": [1536, 1200 if uniform else 1040 + 16 * layer],
            "query_heads": [9, 9],
            "kv_heads": [3, 3],
            "importance": 0.07 + 0.4 / (1 + layer),
        }
        for layer in range(num_layers)
    ]
    how = ("" if uniform else "import shearling; ") + 'AutoModelForCausalLM.from_pretrained("MODEL")'
    return {
        "model": "smollm2-135m",
        "method": "cfsp",
        "before": sizes(1.0),
        "after": sizes(0.88),
        "blocks": blocks,
        "stock": uniform,
        "engines": [
            {"engine": "transformers", "loads": True, "how": how, "faster": "the cut"},
            {"engine": "vllm", "loads": uniform, "how": "needs uniform widths", "faster": ""},
        ],
        "estimate": {"seconds": 300.0, "peak_bytes": 2_600_000_000},
    }


def metrics_of() -> dict[str, Any]:
    story = "Once upon a time there was a small flock of sheep on the edge of a wide moor. " * 3
    return {
        "model": "smollm2-135m",
        "family": "llama",
        "device": "cpu",
        "versions": {"torch": "2.13.0", "transformers": "5.15.1"},
        "dense": evaluated(21.6234, 1.0),
        "pruned": evaluated(33.15, 0.88, kl=0.4312, agreement=0.612),
        "recovered": evaluated(26.02, 0.88, kl=0.2104, agreement=0.703),
        "stages": [
            {"name": "measure", "seconds": 61.4, "peak_bytes": 1_900_000_000},
            {"name": "recover", "seconds": 203.4, "peak_bytes": 2_900_000_000},
        ],
        "samples": [{"prompt": "Once upon", "dense": story, "pruned": story[:90], "recovered": story[9:]}],
    }


def events_of(num_steps: int = 200) -> list[dict[str, Any]]:
    sweep = [{"stage": "measure", "block": block, "seconds": 0.4} for block in range(30)]
    steps = [
        {
            "stage": "recover",
            "step": step,
            "loss": 2.8 + math.exp(-step / 40) + 0.1 * math.sin(3 * step),
            "learning_rate": 1e-4,
            "tokens": 4096 * step,
            "tokens_per_second": 900.0,
        }
        for step in range(1, num_steps + 1)
    ]
    return sweep + steps


def write_run(
    folder: Path,
    plan: dict[str, Any] | None = None,
    metrics: dict[str, Any] | None = None,
    events: list[dict[str, Any]] | None = None,
    recipe: str = "",
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if plan is not None:
        (folder / "plan.json").write_text(json.dumps(plan))
    if metrics is not None:
        (folder / "metrics.json").write_text(json.dumps(metrics))
    if events is not None:
        lines = "".join(json.dumps(event) + "\n" for event in events)
        (folder / "metrics.jsonl").write_text(lines)
    if recipe:
        (folder / "recipe.yaml").write_text(recipe)
    return folder


@pytest.fixture
def full_run(tmp_path: Path) -> Path:
    recipe = "model: smollm2-135m\nstages:\n- kind: cfsp\n  sparsity: 0.2\n"
    run = write_run(tmp_path / "run", plan_of(), metrics_of(), events_of(), recipe)
    (run / "model").mkdir()
    return run


class Page(HTMLParser):
    """A page read by a parser: its elements, its text by section, and whether tags match."""

    VOID = frozenset(("meta", "br", "hr", "img", "link", "input"))

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.section = ""
        self.texts: dict[str, str] = {}
        self.feed(source)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "section":
            self.section = dict(attrs)["id"] or ""
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"stray </{tag}>"
        if tag == "section":
            self.section = ""

    def handle_data(self, data: str) -> None:
        self.texts[self.section] = self.texts.get(self.section, "") + data

    def sections(self) -> list[str | None]:
        return [attributes["id"] for tag, attributes in self.elements if tag == "section"]

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)


def page_of(run: Path) -> Page:
    return Page(write_report(run).read_text(encoding="utf-8"))


def test_a_full_run_has_every_section(full_run: Path) -> None:
    page = page_of(full_run)
    assert page.sections() == SECTIONS
    spaced = {name: re.sub(r"\s+", " ", text) for name, text in page.texts.items()}
    assert "21.62 dense" in spaced["headline"]
    assert "33.15 pruned" in spaced["headline"]
    assert "26.02 recovered" in spaced["headline"]
    assert "134.5 M before" in spaced["headline"]
    assert "0.880" in spaced["headline"]
    assert "134,515,008" in spaced["sizes"]
    assert "1,040\N{EN DASH}1,504" in spaced["sizes"]
    assert "22.50 KiB" in spaced["sizes"]
    assert "61.2 %" in spaced["quality"]
    assert "3 min 23 s" in spaced["cost"]
    assert "import shearling" in spaced["loading"]
    assert "sparsity: 0.2" in spaced["recipe"]
    assert "2.13.0" in spaced["versions"]


def test_the_page_is_accessible_and_alone(full_run: Path) -> None:
    page = page_of(full_run)
    tags = Counter(tag for tag, _ in page.elements)
    assert dict(page.elements)["html"] == {"lang": "en"}
    assert tags["h1"] == tags["main"] == 1
    assert not tags.keys() & {"script", "link", "img", "iframe", "object", "base"}
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.elements:
        assert not {"src", "href", "xlink:href"} & attributes.keys()
        assert not any(name.startswith("on") for name in attributes)
        if tag == "th":
            assert attributes["scope"] in ("col", "row", "colgroup")
        if attributes.get("role") == "img":
            assert set((attributes["aria-labelledby"] or "").split()) <= set(ids)
    assert tags["table"] == tags["caption"]
    source = (full_run / "report.html").read_text()
    assert "@import" not in source
    assert "url(" not in source


def test_a_plan_alone_makes_a_page(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run", plan=plan_of()))
    assert page.sections() == ["headline", "sizes", "widths", "cost", "engines"]
    assert "perplexity" not in page.texts["headline"].lower()


def test_a_run_without_recovery_does_not_mention_it(full_run: Path) -> None:
    metrics = metrics_of()
    del metrics["recovered"], metrics["samples"][0]["recovered"]
    page = page_of(write_run(full_run, metrics=metrics, events=events_of(0)))
    assert "training" not in page.sections()
    assert "recovered" not in "".join(page.texts.values())


def test_a_run_that_only_trained_says_so(full_run: Path) -> None:
    plan, metrics = plan_of() | {"method": "lora", "after": sizes(1.0)}, metrics_of()
    for block in plan["blocks"]:
        block["ffn"] = [block["ffn"][1]] * 2
    del metrics["pruned"], metrics["samples"][0]["pruned"]
    metrics["recovered"] = evaluated(20.5, 1.0, kl=0.1, agreement=0.8)
    planned = page_of(write_run(full_run.with_name("planned"), plan=plan))
    assert (
        "smollm2-135m, trained" in planned.texts[""]
        and "Planned: to train; all 134.5\N{NO-BREAK SPACE}M" in planned.texts[""]
    )
    page = page_of(write_run(full_run, plan=plan, metrics=metrics, recipe="stages: [recover]"))
    assert page.sections() == [name for name in SECTIONS if name != "widths"]
    everything = "".join(page.texts.values())
    assert "Trained; all 134.5" in everything and "against the original model" in everything
    assert not any(word in everything for word in ("pruned", "dense", "Removed", "recovered"))
    assert page.texts["headline"].count("unchanged") == 3


@pytest.mark.parametrize("key", ["dense", "pruned", "stages", "samples", "versions", "family"])
def test_any_part_of_the_metrics_may_be_absent(full_run: Path, key: str) -> None:
    metrics = metrics_of()
    del metrics[key]
    absent = {"samples": "samples", "versions": "versions"}.get(key)
    assert page_of(write_run(full_run, metrics=metrics)).sections() == [name for name in SECTIONS if name != absent]


@pytest.mark.parametrize("key", list(plan_of()))
def test_any_part_of_the_plan_may_be_absent_or_odd(full_run: Path, key: str) -> None:
    for odd in (None, [], {}, "odd", [1, "two", None], {"parameters": "many"}):
        page_of(write_run(full_run, plan=plan_of() | {key: odd}))
        page_of(write_run(full_run, metrics=metrics_of() | {key: odd}))


def test_uniform_widths_need_no_import(full_run: Path) -> None:
    page = page_of(write_run(full_run, plan=plan_of(uniform=True)))
    assert "import shearling" not in page.texts["loading"]
    compile(page.texts["loading"].split("Load it", 1)[1].strip(), "page", "exec")


def test_a_folder_with_quotes_makes_valid_code(full_run: Path) -> None:
    run = full_run.rename(full_run.with_name('it\'s "mine" \N{SHEEP}'))
    code = page_of(run).texts["loading"].split("knows them.", 1)[1].strip()
    line = next(line for line in code.splitlines() if line.startswith("folder = "))
    scope: dict[str, str] = {}
    exec(line, scope)
    assert scope["folder"] == str(run / "model")


def infect(value: Any) -> Any:
    if isinstance(value, str):
        return HOSTILE
    if isinstance(value, dict):
        return {key: infect(part) for key, part in value.items()}
    if isinstance(value, list):
        return [infect(part) for part in value]
    return value


def test_nothing_from_the_run_becomes_markup(full_run: Path) -> None:
    clean = page_of(full_run)
    metrics = infect(metrics_of())
    metrics["versions"] = {HOSTILE: HOSTILE, "torch": HOSTILE}
    events = [event | {"stage": HOSTILE} for event in events_of()]
    page = page_of(write_run(full_run, infect(plan_of()), metrics, events, HOSTILE))
    assert page.sections() == clean.sections()
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in clean.elements]
    for name in ("quality", "cost", "samples", "engines", "recipe", "versions", "training"):
        assert HOSTILE in page.texts[name], name


def test_half_a_surrogate_pair_in_a_sample_can_be_written(full_run: Path) -> None:
    metrics = metrics_of()
    metrics["samples"][0]["pruned"] = "half \ud83d and a NUL \x00"
    assert "half ?" in page_of(write_run(full_run, metrics=metrics)).texts["samples"]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None, "12", True, HUGE])
def test_what_is_not_a_number_is_a_dash(full_run: Path, bad: Any) -> None:
    write = (numbers.significant, numbers.decimal, numbers.size, numbers.duration, numbers.percent)
    assert {function(bad) for function in (*write, numbers.count)} == {numbers.DASH}
    assert numbers.ratio(bad, 1) == numbers.ratio(1, bad) == numbers.ratio(1, 0) == numbers.DASH
    plan, metrics, events = plan_of(), metrics_of(), events_of()
    for block in plan["blocks"][::2]:
        block |= {"ffn": [bad, bad], "importance": bad}
    metrics["pruned"] |= dict.fromkeys(("perplexity", "kl", "agreement", "tokens"), bad)
    metrics["stages"][0] |= {"seconds": bad, "peak_bytes": bad}
    events[40] |= {"loss": bad, "tokens_per_second": bad}
    page = page_of(write_run(full_run, plan, metrics, events))
    whole = " ".join(text for section, text in page.texts.items() if section)
    assert not re.search(r"\b(nan|inf|None|True)\b", whole, re.IGNORECASE)
    assert numbers.DASH in page.texts["quality"]


@pytest.mark.parametrize(
    ("written", "wanted"),
    [
        (numbers.significant(9.99996), "10.00"),
        (numbers.significant(3786.4), "3,786"),
        (numbers.significant(67515.0), "67,520"),
        (numbers.significant(-1.2e-6), "\N{MINUS SIGN}1.200e\N{MINUS SIGN}06"),
        (numbers.decimal(999_999), "1.000 M"),
        (numbers.decimal(512), "512"),
        (numbers.size(1023), "1023 B"),
        (numbers.size(2**20 - 1), "1.000 MiB"),
        (numbers.duration(0.4), "0.40 s"),
        (numbers.duration(99.97), "1 min 40 s"),
        (numbers.duration(3599.6), "1 h 00 min"),
        (numbers.duration(-1), numbers.DASH),
        (numbers.percent(0.71), "71.0 %"),
        (numbers.ratio(85, 100), "0.850\N{MULTIPLICATION SIGN}"),
        (numbers.span([3, None, 3]), "3"),
    ],
)
def test_numbers_have_units_and_sensible_digits(written: str, wanted: str) -> None:
    assert written.replace(numbers.NBSP, " ") == wanted


@given(
    st.floats(-1e300, 1e300, allow_nan=False),
    st.floats(-1e300, 1e300, allow_nan=False),
    st.integers(1, 12),
    st.booleans(),
)
def test_ticks_enclose_the_data_evenly(low: float, high: float, count: int, whole: bool) -> None:
    ticks = svg.nice_ticks(low, high, count, whole=whole)
    blur = 1e-9 * (ticks[1] - ticks[0])
    assert ticks[0] - blur <= min(low, high) <= max(low, high) <= ticks[-1] + blur
    assert 2 <= len(ticks) <= count + 2
    steps = [after - before for before, after in pairwise(ticks)]
    assert min(steps) > 0
    largest = max(abs(ticks[0]), abs(ticks[-1]))
    assert max(steps) - min(steps) <= 1e-14 * largest + 1e-9 * min(steps)
    assert len(set(svg.tick_labels(ticks))) == len(ticks) or max(steps) < 1e-5 * largest
    if whole:
        assert all(tick == round(tick) for tick in ticks)


@given(st.integers(-280, 298), st.sampled_from([1, 2, 5]))
def test_steps_are_one_two_or_five(exponent: int, mantissa: int) -> None:
    unit = float(f"{mantissa}e{exponent}")
    step = svg.nice_ticks(0, 3.7 * unit, 4)[1]
    assert f"{step:e}"[0] in "125"
    assert re.fullmatch(r"[125]\.0+", f"{step:.12e}".split("e")[0])


def test_ticks_print_exactly() -> None:
    assert svg.nice_ticks(0, 0.5) == (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
    assert svg.tick_labels((0.0, 0.05, 0.1)) == ("0.00", "0.05", "0.10")
    assert svg.tick_labels((-1000.0, 0.0, 1000.0)) == ("\N{MINUS SIGN}1,000", "0", "1,000")
    assert svg.nice_ticks(0, 3, 2, whole=True) == (0.0, 2.0, 4.0)


def test_text_in_a_picture_is_escaped() -> None:
    body = svg.text(0, 0, HOSTILE, "tick") + svg.bar(0, 1, 0, 1, 'a" b', HOSTILE)
    page = Page(svg.picture("x", HOSTILE, HOSTILE, (10, 10), body))
    expected = ["svg", "title", "desc", "text", "rect", "title"]
    assert [tag for tag, _ in page.elements] == expected


def test_a_gap_breaks_the_line_and_a_lone_point_is_a_dot() -> None:
    path = svg.line([(0, 0), (1, 1), None, (3, 3)], "curve")
    assert 'd="M0.00 0.00L1.00 1.00M3.00 3.00h0"' in path
    assert svg.line([None], "curve") == ""


@pytest.mark.parametrize("num_layers", [1, 2, 17, 200])
def test_any_number_of_layers_fits(num_layers: int) -> None:
    page = Page(width_plot("ffn", "FFN channels", [(64.0, 48.0)] * num_layers))
    assert page.count("rect") == 2 * num_layers
    assert page.count("text") <= num_layers + 12


@pytest.mark.parametrize("num_steps", [1, 2, 5000])
def test_any_number_of_steps_fits(num_steps: int) -> None:
    plot = step_plot("loss", "recover", [(float(step), 3.0) for step in range(num_steps)])
    assert len(plot) < 30_000
    Page(plot)


def test_repeated_steps_of_a_resumed_run_count_once(full_run: Path) -> None:
    events = [{"stage": "recover", "step": s, "loss": loss} for s, loss in [(1, 9), (2, 8), (2, 4)]]
    text = page_of(write_run(full_run, events=events)).texts["training"]
    assert "from 9.000 at step 1 to 4.000 at step 2, lowest 4.000" in text


@pytest.mark.parametrize("num_domains", [1, 3, 17])
def test_domains_have_a_line_each_and_a_legend(full_run: Path, num_domains: int) -> None:
    names = [f"domain {HOSTILE} {number}" for number in range(num_domains)]
    weights = [{f"weight/{name}": (number + step) / 100 for number, name in enumerate(names)} for step in range(9)]
    events = [{**event, **weights[min(n, 8)]} for n, event in enumerate(events_of(9)[30:])]
    for step in (4, 8):
        excess = {f"excess_loss/{name}": math.nan if step == 8 else 0.25 for name in names}
        events.append({"stage": "recover", "step": step, "validation_loss": 3.0, **excess})
    page = page_of(write_run(full_run, events=events))
    text = re.sub(r"\s+", " ", page.texts["training"])
    assert "Weights of domains in stage recover." in text
    assert "Losses of domains minus their references in stage recover." in text
    assert f"{names[0]} from {numbers.significant(0.0)} to {numbers.significant(0.08)}" in text
    items = [attributes["class"] for tag, attributes in page.elements if tag == "li" and "class" in attributes]
    for number in range(num_domains):
        assert items.count(f"line {domain_class(number)}") >= 2
    assert "script" not in dict(page.elements)


def test_lines_of_domains_are_told_apart() -> None:
    assert len({domain_class(number) for number in range(16)}) == 16
    plot = domain_plot("w", "recover", {"a": [(1.0, 0.5), (9.0, 0.25)], "b": [(1.0, 0.5), (5.0, None), (9.0, 0.75)]})
    assert "Lines: weight, a from 0.5000 to 0.2500, b from 0.5000 to 0.7500." in plot
    assert plot.count('class="curve domain-') == 2
    Page(plot)


def test_an_unfinished_last_event_is_left_out(full_run: Path) -> None:
    with (full_run / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "recover", "st')
    assert "training" in page_of(full_run).sections()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("plan.json", "{", "plan.json: not JSON"),
        ("metrics.json", "[]", "metrics.json: must hold a JSON object, not list"),
        ("metrics.jsonl", "{}\nnope\n", "metrics.jsonl, line 2: not JSON"),
        ("recipe.yaml", b"\xff", "recipe.yaml: cannot be read"),
    ],
)
def test_an_unreadable_file_is_named(full_run: Path, name: str, content: str | bytes, message: str) -> None:
    before = write_report(full_run).read_bytes()
    (full_run / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ShearlingError, match=re.escape(message)) as caught:
        write_report(full_run)
    assert "\n" not in str(caught.value)
    assert (full_run / "report.html").read_bytes() == before


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ShearlingError, match="no such run directory"):
        write_report(tmp_path / "absent")
    with pytest.raises(ShearlingError, match="not a run"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_page_that_cannot_be_written_leaves_nothing(full_run: Path) -> None:
    (full_run / "report.html").mkdir()
    names = sorted(path.name for path in full_run.iterdir())
    with pytest.raises(ShearlingError, match="cannot be written"):
        write_report(full_run)
    assert sorted(path.name for path in full_run.iterdir()) == names


# The page is measured from outside, in a frame as wide as the screen: its own policy forbids
# scripts, and a headless window cannot be made as narrow as a phone.
MEASURE = """<!doctype html><meta charset="utf-8"><body>
<iframe id="frame" style="border:0;width:WIDTHpx;height:900px" srcdoc="PAGE"></iframe>
<pre id="answer"></pre><script>
onload = () => {
  const page = document.getElementById("frame").contentDocument;
  const root = page.documentElement;
  page.querySelectorAll("details").forEach(d => d.open = true);
  const scrolls = e => e && (getComputedStyle(e).overflowX === "auto" || scrolls(e.parentElement));
  const wide = [...page.querySelectorAll("body *")].filter(e => !scrolls(e)
    && e.getBoundingClientRect().right > root.clientWidth + 0.5);
  document.getElementById("answer").textContent = JSON.stringify({
    scroll: root.scrollWidth, client: root.clientWidth,
    wide: wide.map(e => e.tagName + "." + e.getAttribute("class")),
    height: root.scrollHeight, sections: page.querySelectorAll("section").length});
};
</script>"""


@pytest.fixture(scope="module")
def browser() -> str:
    found = next((path for path in map(shutil.which, BROWSERS) if path), None)
    if found is None:
        pytest.skip("no Chromium is installed")
    return found


def browse(browser: str, profile: Path, *arguments: str) -> str:
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += ["--disable-dev-shm-usage", f"--user-data-dir={profile}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("hostile", [False, True])
def test_nothing_is_wider_than_the_screen(
    full_run: Path, tmp_path: Path, browser: str, width: int, hostile: bool
) -> None:
    if hostile:
        long = json.loads(json.dumps(metrics_of()).replace("Once", "Once" * 80))
        long |= {"model": "m" * 300, "versions": {"v" * 90: "9" * 200}}
        plan = plan_of(num_layers=120) | {"engines": [{"engine": "e" * 80, "how": "h" * 200}]}
        write_run(full_run, plan, long)
    source = escape(write_report(full_run).read_text(), quote=True)
    frame = tmp_path / "frame.html"
    frame.write_text(MEASURE.replace("WIDTH", str(width)).replace("PAGE", source))
    window = f"--window-size={width + 40},1000"
    dom = browse(browser, tmp_path / "profile", window, "--dump-dom", frame.as_uri())
    answer = re.search(r'<pre id="answer">(.*?)</pre>', dom, re.DOTALL)
    assert answer and answer[1], dom[-500:]
    seen = json.loads(unescape(answer[1]))
    assert seen["sections"] == len(SECTIONS)
    assert seen["height"] > 2000
    assert seen["wide"] == []
    assert seen["scroll"] <= seen["client"] <= width


def test_a_browser_paints_the_page(full_run: Path, tmp_path: Path, browser: str) -> None:
    page, picture = write_report(full_run), tmp_path / "page.png"
    window = "--window-size=1280,1600"
    browse(browser, tmp_path / "profile", window, f"--screenshot={picture}", page.as_uri())
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 40_000
