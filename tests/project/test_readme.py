"""README's tables are those of the files that benchmarks have saved."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks import readme

TEXT = readme.README.read_text(encoding="utf-8")


def test_the_tables_are_those_of_the_files():
    assert readme.main(["--check"]) == 0, "python -m benchmarks.readme"
    assert readme.rewritten(TEXT) == TEXT
    assert [m["name"] for m in readme.MARKED.finditer(TEXT)] == list(readme.TABLES)


@pytest.mark.parametrize("name", readme.TABLES)
def test_a_stale_table_is_named(name, tmp_path, monkeypatch, capsys):
    start = TEXT.index(marker := f"<!-- table: {name} -->") + len(marker)
    at = next(i for i in range(start, len(TEXT)) if TEXT[i].isdigit())
    copy = tmp_path / "README.md"
    copy.write_text(TEXT[:at] + "9" * 4 + TEXT[at:], encoding="utf-8")
    monkeypatch.setattr(readme, "README", copy)
    assert readme.main(["--check"]) == 1
    assert capsys.readouterr().err == f"README.md: table {name} is stale: python -m benchmarks.readme\n"
    assert readme.main([]) == 0
    assert copy.read_text(encoding="utf-8") == TEXT


def test_a_table_that_is_not_there_or_not_known_is_named():
    assert readme.stale(TEXT.replace("<!-- table: ops -->", "")) == ["ops"]
    with pytest.raises(ValueError, match=r"tables must be among machine, .*; found op"):
        readme.stale(TEXT.replace("<!-- table: ops -->", "<!-- table: op -->"))


def test_a_disagreement_shows_in_the_place_of_a_ratio(monkeypatch):
    def without(file: str):
        found = original(file)
        for m in found.measurements:
            for name, rival in m.rivals.items():
                m.rivals[name] = replace(rival, speed_up=None) if name == "torchjd" else rival
        return found

    original = readme.results.__wrapped__
    monkeypatch.setattr(readme, "results", without)
    row = next(line for line in readme.loops().splitlines() if line.startswith("| TorchJD: `UPGrad`"))
    assert row.count("≠ / ≠ / ≠") == 4
    assert "≠: comes to other weights." in readme.loops()
    row = next(line for line in readme.solvers().splitlines() if line.startswith("| `nash_mtl`"))
    assert row.count("≠") == 4
