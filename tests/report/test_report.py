"""The page shows all that was measured, needs no other file, and trusts no text from files."""

from __future__ import annotations

import json
import math
import pathlib
from html.parser import HTMLParser

import pytest

from igb_kernels.__main__ import main
from igb_kernels.bench.results import Measurement, Results, Rival, Timing
from igb_kernels.report import find, page
from igb_kernels.report.words import count, digits, power, size, time

VOID = {"meta", "br", "hr", "img", "input", "link"}
NASTY = "</style><script>alert('\"&')</script>\x00\ud800"
MACHINE = {"device": "a CPU", "cores": 2, "torch": "2.13.0", "backends": {"cpu": "available"}, "gpu": None}


class Parsed(HTMLParser):
    """Checks that what is opened is closed, and keeps tags, attributes and texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.titles: list[str] = []
        """What is said under the pointer."""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag not in ("span", "sup", "strong", "code"):
            self.texts.append(" ")

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            (self.titles if self.open[-1] == "title" else self.texts).append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.texts).split())


def timing(ms: float) -> Timing:
    return Timing(ms, 0.97 * ms, 1.06 * ms, 21)


def measurement(suite: str, name: str, ms: float, tasks: int = 3, params: int = 0, **rest) -> Measurement:
    return Measurement(suite, name, tasks, params, rest.pop("dtype", "float32"), "cpu", "cpu", timing(ms), **rest)


def save(folder: pathlib.Path, measurements: list[Measurement], name: str = "r", **machine: object) -> None:
    date = "2026-01-02T03:04:05+00:00"
    Results({**MACHINE, **machine}, "abc1234", f"bench {name}", date, measurements).save(folder / f"{name}.json")


def everything() -> list[Measurement]:
    copy = Rival(timing(0.81), 0.5)
    found = [measurement("ops", "gram", 1.62, params=1000, moved_bytes=4_000_000, error=1.5e-9, rivals={"copy": copy})]
    for i, (k, d) in enumerate((k, d) for k in (2, 8, 64) for d in (10**4, 10**6, 10**7, 10**8)):
        ms = 0.0123 + 2e-9 * k**1.3 * d * (1 + 0.01 * (i % 3))
        rivals = {"copy": Rival(timing(0.9 * ms), 0.9)}
        found.append(measurement("scaling", "combine_", ms, k, d, moved_bytes=4 * k * d, rivals=rivals))
    found += [
        measurement("solvers", "nash_mtl", 1e-3 * k**1.2, k, rivals={
            "native call": Rival(timing(1e-4 * k**2.2), 0.3), "torchjd": Rival(timing(14.1 * k), 777.0, 1e-8)})
        for k in (3, 8, 16, 64)
    ]  # fmt: skip
    passes = Rival(timing(28.3), 0.91)
    wrong = Rival(timing(2.718), None, 0.25, "results disagree: error 2.5e-01")
    found.append(measurement("step", "igb_v1+nash_mtl", 31.1, 8, 5_800_000, model="mlp-5.8m",
                             rivals={"passes": passes, "libmtl": wrong}))  # fmt: skip
    return found


def profile() -> dict[str, object]:
    def part(name: str, ms: float) -> dict[str, object]:
        return {"name": name, "host_ms": ms, "device_ms": None, "share": ms / 10}

    parts = [part("forward", 2.0), part("backward pass of a", 3.0), part("backward pass of b", 3.5),
             part("Gramian and norms", 0.5), part("optimizer", 1.0)]  # fmt: skip
    compared = [{"name": name, "ms": 0.5, "reference_ms": 7.77, "agree": agree, "ratio": 15.5 if agree else None}
                for name, agree in (("Gramian and norms", True), ("all", True))]  # fmt: skip
    return {"balancer": "Balancer(x)", "device": "cpu", "torch": "2.13.0", "tasks": 2, "steps": 20, "step_ms": 10.1,
            "parts": parts, "compared": compared, "backends": ["cpu"], "copy_ms": 0.1, "gradient_bytes": 1,
            "peak_bytes": 2, "advice": ["Do less."], "notes": []}  # fmt: skip


@pytest.fixture
def shown(tmp_path) -> Parsed:
    save(tmp_path, everything())
    (tmp_path / "profile.json").write_text(json.dumps([profile()]))
    return Parsed(page(find(tmp_path)))


def test_every_measurement_is_there(shown):
    for m in everything():
        for t in [m.timing, *(rival.timing for rival in m.rivals.values())]:
            assert time(t.ms) in shown.text
            assert f"{time(t.low)} – {time(t.high)}" in shown.text
        assert m.name in shown.text
    for said in ("1.5e-09", "4 MB", "a CPU, 2 cores", "2.13.0", "abc1234", "bench r", "2026-01-02", "Do less."):
        assert said in shown.text
    marks = sum("mark" in (a.get("class") or "").split() for _, a in shown.tags)
    assert (
        marks >= 12 * 4 + 4 * 3 + 1
    )  # scaling over K and D and in GB/s with the copy, solvers with two rivals, a step


def test_it_needs_no_other_file(shown):
    assert not {tag for tag, _ in shown.tags} & {"script", "link", "img", "iframe", "object", "embed", "use", "image"}
    assert not {name for _, a in shown.tags for name in a if name in ("src", "href", "srcset", "xlink:href", "style")}
    assert "url(" not in "".join(shown.rawdata)
    assert not any(name.startswith("on") for _, a in shown.tags for name in a)
    meta = [a for tag, a in shown.tags if tag == "meta"]
    assert {"charset": "utf-8"} in meta
    assert any(a.get("name") == "viewport" for a in meta)


def test_a_disagreement_has_no_speed_up(shown):
    assert (
        "LibMTL 2.72 ms (2.64 ms – 2.88 ms): no speed-up, error 2.5e-01, results disagree: error 2.5e-01" in shown.text
    )
    assert "In 1 comparison (LibMTL) there is no speed-up to give" in shown.text
    assert "≠" in shown.texts
    assert sum((a.get("class") or "") == "mark libmtl" for _, a in shown.tags) == 1  # in the legend


def test_a_wrong_result_of_ours_is_said_first(tmp_path):
    rivals = {
        "copy": Rival(timing(1.0), None, None, "ours: results disagree"),
        "with forward": Rival(timing(2.0), None),
    }
    save(
        tmp_path, [measurement("ops", "gram", 1.0, params=10, moved_bytes=8, rivals=rivals, note="results disagree: 1")]
    )
    shown = Parsed(page(find(tmp_path)))
    assert "Our own results are wrong: gram, D = 10, K = 3, float32. In 1 comparison (a copy) there is no" in shown.text
    assert "wrong: results disagree: 1" in shown.text
    assert "with forward 2.00 ms (1.94 ms – 2.12 ms): ours" in shown.text


def test_what_to_read_off(shown):
    summary = shown.text.partition("All measurements")[0]
    assert "Operations on gradients move 50 % of the bytes a second that a copy does." in summary
    assert "A balanced step takes 1.10 times as long as the K backward passes in it." in summary
    assert "Solvers are 780 times as fast as TorchJD." in summary
    assert "time ∝ K1.3" in summary
    assert "With 2 tasks a call takes 12 µs however few the elements, the work longer than that from D = 2." in summary


def test_a_profile_is_drawn_beside_the_reference(shown):
    assert "2 backward passes" in shown.text
    for said in ("6.50 ms", "7.77 ms", "15.5×", "17.3 ms", "65.0 %"):
        assert said in shown.text


def test_texts_of_files_are_texts(tmp_path):
    rivals = {NASTY: Rival(timing(1.0), None, None, NASTY), "copy": Rival(timing(1.0), 1.0)}
    odd = [measurement(suite, NASTY, 1.0, params=p, dtype=NASTY, model=NASTY, moved_bytes=8, rivals=rivals)
           for suite, p in (("ops", 10), ("scaling", 10), ("solvers", 0), ("step", 10), (NASTY, 0))]  # fmt: skip
    save(tmp_path, odd, "<b>", **{NASTY: NASTY, "nested": {NASTY: [NASTY]}})
    figures = json.loads(json.dumps(profile()).replace("Gramian and norms", "<i>x"))
    figures |= {"balancer": NASTY, "device": NASTY, "advice": [NASTY], "notes": [NASTY]}
    (tmp_path / "<script>.json").write_text(json.dumps([figures]))
    (tmp_path / "<u>.json").write_text("{")
    text = page(find(tmp_path))
    shown = Parsed(text)
    assert not {"script", "b", "i", "u"} & {tag for tag, _ in shown.tags}
    assert len(shown.tags) > 100
    assert shown.text.count("alert(") > 20
    assert "\x00" not in text
    text.encode()


def test_numbers_that_cannot_be_drawn(tmp_path):
    odd = [measurement("solvers", "x", ms, k, rivals={"torchjd": Rival(timing(ms), ms)})
           for k, ms in ((2, math.nan), (4, math.inf), (8, 0.0), (0, 1.0), (16, 1.0))]  # fmt: skip
    odd += [measurement("step", "x", 1.0, model="m", rivals={"passes": Rival(timing(1.0), math.nan)})]
    save(tmp_path, odd)
    shown = Parsed(page(find(tmp_path)))
    assert "nan" in shown.text
    assert not [a for _, a in shown.tags for value in a.values() if value in ("nan", "inf", "NaN")]


def test_of_two_runs_on_a_machine_the_newest_is_drawn_and_both_are_listed(tmp_path):
    for name, ms, date in (("a", 5.0, "2026-02-01"), ("b", 7.0, "2026-01-01")):
        Results(MACHINE, "c", name, date, [measurement("solvers", "x", ms, 4)]).save(tmp_path / f"{name}.json")
    save(tmp_path, [measurement("solvers", "x", 9.0, 4)], "other", device="another CPU")
    shown = Parsed(page(find(tmp_path)))
    assert [t for t in shown.titles if "(K = 4)" in t] == [
        "igb_kernels: 5.00 ms (K = 4)",
        "igb_kernels: 9.00 ms (K = 4)",
    ]
    assert {"5.00 ms", "7.00 ms", "9.00 ms"} <= set(shown.texts)
    assert [tag for tag, _ in shown.tags].count("h2") == 3  # two machines, all measurements


def test_the_command(tmp_path, capsys):
    (tmp_path / "below").mkdir()
    save(tmp_path / "below", everything())
    (tmp_path / "notes.json").write_text('{"a": 1}')
    (tmp_path / "broken.json").write_text('{"schema": 1, "measurements": [{"suite": "ops"}]}')
    out = tmp_path / "page.html"
    assert main(["report", str(tmp_path), "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{out}: 1 run and 0 profiles\n"
    assert "skipped: notes.json is neither a result of `bench` nor of `profile --json`" in printed.err
    assert "skipped: broken.json is not a whole result of `bench`: KeyError: 'rivals'" in printed.err
    text = Parsed(out.read_text(encoding="utf-8")).text
    assert "notes.json is neither a result" in text
    assert main(["report", str(tmp_path), "--out", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["page"] == str(out)
    assert found["shown"] == ["below/r.json"]
    assert set(found["skipped"]) == {"notes.json", "broken.json"}


@pytest.mark.parametrize("broken", [{"parts": [{"name": "x"}]}, {"compared": [1]}, {"notes": None}, {"parts": 1}])
def test_a_broken_profile_is_skipped(tmp_path, broken):
    (tmp_path / "p.json").write_text(json.dumps({**profile(), **broken}))
    found = find(tmp_path)
    assert not found.profiles
    assert found.skipped["p.json"].startswith("is not a whole profile: ")


def test_a_number_that_is_text_is_not_shown(tmp_path):
    save(tmp_path, [measurement("ops", "x", 1.0)])
    path = tmp_path / "r.json"
    path.write_text(path.read_text().replace('"low": 0.97', '"low": "<b>"'))
    assert find(tmp_path).skipped == {"r.json": "has '<b>' where a number must be, in x"}


@pytest.mark.parametrize("there", [True, False])
def test_nothing_to_show(tmp_path, capsys, there):
    folder, out = tmp_path / "x", tmp_path / "page.html"
    if there:
        folder.mkdir()
    assert main(["report", str(folder), "--out", str(out)]) == 1
    said = "has no results of `bench` or `profile --json` (*.json)" if there else "must be a folder"
    assert f"{folder} {said}" in capsys.readouterr().err
    assert not out.exists()


def test_numbers_in_words():
    assert [digits(v) for v in (0.0, 9.996, 123.4, 1234.0, 1e-7, 0.01234, -2.5)] == [
        "0", "10.0", "123", "1230", "1.00e-07", "0.0123", "-2.50"]  # fmt: skip
    assert [time(ms) for ms in (0.0016, 0.9999, 1.0, 999.9, 5629.0)] == [
        "1.60 µs",
        "1000 µs",
        "1.00 ms",
        "1000 ms",
        "5.63 s",
    ]
    assert [count(v) for v in (7, 100, 23.5e6, 2e9)] == ["7", "100", "23.5 M", "2 G"]
    assert [size(v) for v in (8, 282e6)] == ["8 B", "282 MB"]
    assert [power(v) for v in (1e4, 1e-3, 1e10)] == ["10⁴", "10⁻³", "10¹⁰"]
