"""Writes tiny/qm9_tiny.csv.gz, the real subset that the tests and `--data tiny` use, from the installed qm9pack."""

from __future__ import annotations

import gzip

from data import COLUMNS, TINY_FILE, qm9pack_files, read_tables, sample_rows

MOLECULES = 400
SEED = 0
# methane, ammonia, water, benzene: their properties are textbook knowledge, so the tests can check units on them
LANDMARKS = (1, 2, 3, 214)


def main() -> None:
    table = read_tables(qm9pack_files())
    sample = table.iloc[sample_rows(len(table), MOLECULES - len(LANDMARKS), SEED)]
    landmarks = table[table["Index"].isin(LANDMARKS)]
    rows = table.loc[landmarks.index.union(sample.index), list(COLUMNS)]
    TINY_FILE.parent.mkdir(exist_ok=True)
    # mtime=0 makes the file a function of its content
    with TINY_FILE.open("wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", filename="", mtime=0) as packed:
        packed.write(rows.to_csv(index=False, lineterminator="\n").encode())
    print(f"{TINY_FILE}: {len(rows)} molecules, {TINY_FILE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
