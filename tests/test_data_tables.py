"""Columns of tables of types that JSON lacks: read as text, or refused by name."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from decimal import Decimal
from uuid import UUID

import pytest

from rlaif_fast.data.reader import read_examples, read_report
from rlaif_fast.errors import UsageError


def test_times_and_decimals_of_a_table_are_texts(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    moment, price = datetime(2024, 1, 2, 3, 4), Decimal("1.50")
    row = {"question": "What?", "answer": "a ball", "made": moment, "facts": {"day": [moment.date()]}}
    table = pyarrow.Table.from_pylist([row | {"price": price, "length": timedelta(seconds=90)}])
    pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "a.parquet")
    [example] = read_examples(tmp_path / "a.parquet")
    assert json.loads(json.dumps(example.metadata)) == {
        "made": "2024-01-02T03:04:00",
        "facts": {"day": ["2024-01-02"]},
        "price": "1.50",
        "length": "0:01:30",
    }


def write_parquet(path, row, **columns):
    """A table of one row: what JSON has, and columns of other types."""
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.Table.from_pylist([row])
    for name, column in columns.items():
        table = table.append_column(name, column)
    pytest.importorskip("pyarrow.parquet").write_table(table, path)
    return path


def test_maps_of_a_table_are_pairs_and_uuids_texts(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    name = UUID(int=7)
    times = pyarrow.array(
        [[("made", datetime(2024, 1, 2))]], pyarrow.map_(pyarrow.string(), pyarrow.timestamp("us"))
    )
    names = pyarrow.ExtensionArray.from_storage(
        pyarrow.uuid(), pyarrow.array([name.bytes], pyarrow.binary(16))
    )
    row = {"question": "What?", "answer": "a ball"}
    [example] = read_examples(write_parquet(tmp_path / "a.parquet", row, times=times, name=names))
    assert example.metadata == {"times": [["made", "2024-01-02T00:00:00"]], "name": str(name)}


@pytest.mark.parametrize("value", [b"\xff", [b"\xff"], {"deep": {"er": b"\xff"}}])
def test_bytes_of_a_table_are_refused_with_their_column(tmp_path, value):
    pytest.importorskip("pyarrow")
    file = write_parquet(
        tmp_path / "a.parquet", {"question": "What?", "answer": "a ball", "thumbnail": value}
    )
    [error] = read_report(file).errors
    assert error.startswith(f"{file}:1: thumbnail: holds bytes; ")


def test_numbers_in_a_map_are_looked_at(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    numbers = pyarrow.array([[("a", float("nan"))]], pyarrow.map_(pyarrow.string(), pyarrow.float32()))
    file = write_parquet(tmp_path / "a.parquet", {"question": "What?", "answer": "a ball"}, numbers=numbers)
    assert read_report(file).errors == [f"{file}:1: nan is no number; leave the key out"]


def test_a_table_with_a_column_twice_or_a_time_beyond_all_is_refused(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    row = {"question": "What?", "answer": "a ball"}
    for name, column, said in (
        ("answer", pyarrow.array(["a cube"]), "a column name stands twice"),
        ("day", pyarrow.array([2**30], pyarrow.date32()), "cannot read the dataset: days="),
    ):
        file = write_parquet(tmp_path / f"{name}.parquet", row, **{name: column})
        with pytest.raises(UsageError, match=said):
            read_report(file)


def test_what_is_no_csv_is_told_with_its_place(tmp_path):
    start = b"question,answer\n" + b"what,disk\n" * 3000
    (tmp_path / "a.csv").write_bytes(start + b"caf\xe9,disk\n")
    with pytest.raises(UsageError, match=rf"a\.csv: not UTF-8 at byte {len(start) + 3}$"):
        read_report(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_bytes(start + b'"so" he,disk\n')
    with pytest.raises(UsageError, match=r"b\.csv: not CSV after line 3001"):
        read_report(tmp_path / "b.csv")
