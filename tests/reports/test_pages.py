"""Pages: one file that asks for nothing, says what it must, and cannot be broken by a name."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from kvstore.errors import UnavailableError
from kvstore.scenario import PolicyChoice
from kvstore.schedule.deployment import Cluster, Deployment, Link
from kvstore.simulate.report.comparison import comparison_page
from kvstore.simulate.report.figures import check_drawing
from kvstore.simulate.report.page import run_page
from kvstore.simulate.report.plots import POINTS, binned_quantile, run_plots, thinned
from kvstore.simulate.report.summary import summarise
from kvstore.simulate.result import Happening
from tests.reports.results import PROFILE, drawn, result, samples

pytest.importorskip("matplotlib", reason="pages need matplotlib")

VOID = {"meta", "br", "hr", "link", "img", "input"}


class Outline(HTMLParser):
    """Elements of a page: that they nest, their identifiers, and all that could make a request."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.tags: set[str] = set()
        self.text: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "src", "xlink:href", "action", "data", "poster", "srcset"):
                self.references.append(value or "")
            self.references += re.findall(r"url\(([^)]*)\)", value or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def check(page: str) -> Outline:
    outline = Outline(page)
    assert outline.open == []
    assert len(set(outline.ids)) == len(outline.ids)
    assert all(each.startswith("#") and each[1:] in outline.ids for each in outline.references), outline.references
    assert not outline.tags & {"script", "link", "iframe", "img", "object", "embed", "base"}
    assert set(re.findall(r"https?://[^\"'\s<]+", page)) <= {
        "http://www.w3.org/1999/xlink",
        "http://www.w3.org/2000/svg",
    }
    assert "@import" not in page
    assert not re.search(r"#0000[0-9a-f]{2}|#000[1-4]00", page), "a colour that is not the page's"
    for picture in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(picture)
    return outline


@pytest.fixture(scope="module")
def page() -> str:
    return run_page(drawn(1))


def test_the_page_of_a_run(page: str) -> None:
    assert "left out" not in page
    outline = check(page)
    text = " ".join(outline.text)
    summary = summarise(drawn(1))
    assert page.count("<svg") == page.count("<figcaption") == 8
    for phrase in (
        "toy",
        "threshold",
        "goodput of",
        "time to first token, P90",
        "far → near",
        "link fault",
        "carries half of its rate",
        "slowest tenth",
        "What is assumed",
        f"{summary.rejected}",
        "time to first token, s",
        "prompts that wait for prefill",
        "threshold_tokens",
    ):
        assert phrase in text, phrase
    assert "not stable" not in text
    assert "mathdefault" not in text


def test_equal_runs_give_equal_pages(page: str) -> None:
    assert run_page(drawn(1)) == page


def test_an_unstable_run_says_so_first() -> None:
    text = " ".join(check(run_page(drawn(1, is_stable=False))).text)
    assert "This run is not stable" in text
    assert text.index("This run is not stable") < text.index("goodput of")


def test_a_run_without_anything_has_a_page() -> None:
    outline = check(run_page(result([], samples(0))))
    assert "svg" not in outline.tags
    check(run_page(result([{}], samples(1))))


def test_names_are_text() -> None:
    evil = "<script>alert(1)</script>\"'&$x^2$ #000001 url(http://x) \\"
    run = drawn(3)
    clusters = (Cluster(evil, PROFILE, 2, 0), Cluster("near", PROFILE, 2, 3))
    deployment = Deployment(clusters, (Link(evil, "near", 1e9),))
    scenario = replace(run.scenario, name=evil, deployment=deployment, policy=PolicyChoice(evil))

    def renamed(values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {
            tuple(evil if part == "far" else part for part in key)
            if isinstance(key, tuple)
            else evil
            if key == "far"
            else key: each
            for key, each in values.items()
        }

    changed = {name: renamed(getattr(run.samples, name)) for name in run.samples.__dataclass_fields__}
    run = replace(
        run,
        scenario=scenario,
        samples=type(run.samples)(**{**changed, "policy": {evil: np.arange(len(run.samples.at_s), dtype=float)}}),
        happenings=(Happening(1.0, evil, evil, evil),),
        tiers=(evil, "ssd"),
    )
    for page in (run_page(run), comparison_page([summarise(run, settings=((evil, evil),))], title=evil)):
        outline = Outline(page)
        assert outline.open == []
        assert not outline.tags & {"script", "img"}
        assert evil in "".join(outline.text)
        for picture in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
            ElementTree.fromstring(picture)


def test_without_matplotlib_it_is_a_named_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UnavailableError, match=r"kvstore\[report\]"):
        check_drawing()
    with pytest.raises(UnavailableError, match=r"kvstore\[report\]"):
        run_page(drawn(1))


def test_figures_need_no_matplotlib() -> None:
    program = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from tests.reports.results import drawn\n"
        "from kvstore.simulate.report.summary import summarise\n"
        "import kvstore.simulate.report.page, kvstore.simulate.report.comparison, kvstore.simulate.report.files\n"
        "print(summarise(drawn(1)).requests)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.stdout == "400\n", done.stderr


def test_long_runs_have_few_points() -> None:
    at_s = np.arange(100_000, dtype=float)
    few, values = thinned(at_s, at_s)
    assert len(few) == POINTS
    assert values.mean() == pytest.approx(at_s.mean(), rel=0.01)
    assert few[-1] == at_s[-1]


def test_binned_quantiles() -> None:
    at = np.array([0.5] * 5 + [1.5] * 4 + [2.0] * 5)
    values = np.array([1.0, 2, 3, 4, 5, 9, 9, 9, 9, 7, 7, 7, 7, 7])
    middles, found = binned_quantile(at, values, np.array([0.0, 1.0, 2.0, 3.0]), 0.5)
    assert middles.tolist() == [0.5, 1.5, 2.5]
    assert found[0] == 3.0
    assert np.isnan(found[1])
    assert found[2] == 7.0


def loads(**changes: Any) -> list[Any]:
    """Two policies at three loads."""
    made = []
    for policy in ("threshold", "naive"):
        for number, share in enumerate((1.0, 1.5, 2.0)):
            run = drawn(number + 10, requests=150)
            arrivals = replace(run.requests, arrival_s=run.requests.arrival_s / share)
            scenario = replace(run.scenario, policy=PolicyChoice(policy))
            run = replace(run, scenario=scenario, requests=arrivals, is_stable=share < 2 or policy != "naive")
            made.append(summarise(run, settings=(("policy.name", policy), ("workload.arrivals.rate_per_s", share * 4))))
    return made


def test_the_page_of_a_comparison() -> None:
    summaries = loads()
    page = comparison_page(
        summaries, title="policies at three loads", failures=[("point 7", "SimulationError: <lost>")]
    )
    outline = check(page)
    text = " ".join(outline.text)
    assert "1 of 6 runs is not stable" in text
    assert "left out" not in text
    assert "SimulationError: <lost>" in text
    assert page.count("<svg") == page.count("<figcaption")
    for summary in summaries:
        assert f"{summary.ttft.p90:.3g} s" in text
    assert "naive" in text


def test_many_clusters_and_links_have_room(recwarn: pytest.WarningsRecorder) -> None:
    """Of what is too much for a picture the largest are drawn, and the caption says what is left out."""
    made = drawn(1, requests=100)
    names = [f"cluster-{number}" for number in range(12)]
    clusters = tuple(replace(made.scenario.deployment.clusters[1], name=name) for name in names)
    pairs = [(source, target) for source in names for target in names if source != target]
    deployment = replace(made.scenario.deployment, clusters=clusters, links=())
    steps = np.arange(len(made.samples.at_s), dtype=float)
    by_cluster = {name: steps * number for number, name in enumerate(names)}
    kinds = ("prefill_waiting", "prefill_busy", "prefill_instances", "decode_running", "decode_waiting")
    samples = replace(
        made.samples,
        **{kind: by_cluster for kind in (*kinds, "decode_instances")},
        link_bytes={pair: steps * number for number, pair in enumerate(pairs)},
        link_capacity_bytes_per_s={pair: steps for pair in pairs},
        policy={f"price[{name}]": steps for name in names},
    )
    made = replace(made, scenario=replace(made.scenario, deployment=deployment), samples=samples)
    captions = {plot.svg.split('id="')[1].split("-figure")[0]: plot for plot in run_plots(made, summarise(made))}
    assert not recwarn.list
    egress = captions["egress"]
    assert f"{len(pairs) - 8} more are left out" in egress.caption
    assert "cluster-11 → cluster-10" in egress.svg
    assert "cluster-0 → cluster-1" not in egress.svg
    for name in ("queues", "use", "policy"):
        assert "4 more are left out" in captions[name].caption
        assert captions[name].svg.count(">cluster-") == 8
    text = captions["queues"].svg
    assert ">cluster-11<" in text
    assert ">cluster-0<" not in text
