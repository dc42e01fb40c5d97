"""What a data file may be: JSONL, a JSON array, parquet, several of them; and what is named as something else."""

import gzip
import json
import sys
import tracemalloc

import pytest
from support import ASSETS

import data
import hf
import runtime.rows
from runtime.process import UserError


ROWS = [{"prompt": f"Question {i}?", "response": f"Answer {i} α\n😀.", "group": "g"} for i in range(5)]


@pytest.fixture(scope="module")
def tokenizer():
    return hf.load_tokenizer(ASSETS)


def as_jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write_parquet(path, rows, **options):
    import pyarrow
    import pyarrow.parquet
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    return path


def ids_of(samples):
    return [sample.ids.tolist() for sample in samples]


# ---------------------------------------------------------------------------------------------------------------------
# JSON arrays

def test_an_array_is_read_as_the_lines_are(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_bytes(as_jsonl(ROWS))
    expected, _ = data.load_samples(tmp_path / "a.jsonl", tokenizer)
    plain, indented = json.dumps(ROWS).encode(), json.dumps(ROWS, indent=2, ensure_ascii=False).encode()
    contents = {
        "a.json": plain, "b.json": indented, "c.json": b"\xef\xbb\xbf\r\n  " + plain + b"\n", "d.json.gz": gzip.compress(plain),
        "e.jsonl": plain,                                                 # by what is in it, whatever its name
        "f.json": as_jsonl(ROWS), "g.json.gz": gzip.compress(as_jsonl(ROWS)),
    }
    for name, content in contents.items():
        path = tmp_path / name
        path.write_bytes(content)
        samples, counts = data.load_samples(path, tokenizer)
        assert ids_of(samples) == ids_of(expected) and counts["samples"] == 5
        assert [sample.line for sample in samples] == [1, 2, 3, 4, 5]
        place = f"{path}:3" if name in ("f.json", "g.json.gz") else f"{path}: row 3"
        assert samples[2].where == place


@pytest.mark.parametrize("content, words", [
    (b'[{"text": "a"}, {"text": "b"}, {"text": ""}]', "row 3: the keys are 'text' (empty)"),
    (b'[{"text": "a"}, ["b"]]', "row 2: a JSON list; expected an object"),
    (b'[{"text": "a"},\n {"text": "b" "c"}]', "not JSON: Expecting ',' delimiter: line 2"),
    (b'[{"text": "a"}', "not JSON"),
    (b'[{"text": "a"}] [{"text": "b"}]', "not JSON: Extra data"),
    (b"[]", "no rows"),
    (b'[{"text": "a"}, {"text": "\\ud83d"}]', r"row 2: '\ud83d' is half a character"),
    (b'[{"text": "\xff"}]', "not UTF-8 at byte 11"),
    (b"[" * 100_000, "not JSON: maximum recursion depth"),
])
def test_what_is_wrong_in_an_array_is_named_with_its_row(content, words, tmp_path, tokenizer):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError) as error:
        data.load_samples(tmp_path / "a.json", tokenizer)
    assert f"{tmp_path / 'a.json'}: " in str(error.value) and words in str(error.value) and "\n" not in str(error.value)


def test_an_array_without_end_is_refused(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(runtime.rows, "ARRAY_BYTES", 2 ** 20)
    with gzip.open(tmp_path / "a.json.gz", "wb", 1) as f:
        f.write(b"[")
        for _ in range(200):
            f.write(b" " * 1_000_000)
    tracemalloc.start()
    with pytest.raises(UserError, match="more than 1 MiB.*expected JSONL or parquet"):
        data.load_samples(tmp_path / "a.json.gz", tokenizer)
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()


# ---------------------------------------------------------------------------------------------------------------------
# Parquet

@pytest.mark.slow
def test_parquet_is_read_as_the_lines_are(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_bytes(as_jsonl(ROWS))
    expected, _ = data.load_samples(tmp_path / "a.jsonl", tokenizer)
    for options in ({}, {"row_group_size": 2}, {"compression": "zstd"}, {"use_dictionary": ["group"]}):
        path = write_parquet(tmp_path / "a.parquet", ROWS, **options)
        samples, _ = data.load_samples(path, tokenizer)
        assert ids_of(samples) == ids_of(expected) and [sample.line for sample in samples] == [1, 2, 3, 4, 5]
        assert samples[4].where == f"{path}: row 5"


@pytest.mark.slow
def test_parquet_holds_lists_of_objects_and_nulls(tmp_path, tokenizer):
    rows = [
        # Every object of a column gets every key of the column, null where it had none.
        {"messages": [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "B.", "weight": 0, "tool_calls": None},
                      {"role": "assistant", "content": "C."}], "prompt": None, "response": None},
        {"messages": None, "prompt": "D?", "response": "E."},
    ]
    path = write_parquet(tmp_path / "a.parquet", rows)
    (one, two), _ = data.load_samples(path, tokenizer)
    assert tokenizer.decode(one.ids[one.response]) == "C.<|endoftext|>"
    assert tokenizer.decode(two.ids[two.response]) == "E.<|endoftext|>"


@pytest.mark.slow
def test_what_is_wrong_in_parquet_is_named_with_its_row(tmp_path, tokenizer):
    import pyarrow
    import pyarrow.parquet
    good = {"prompt": "a", "response": "b"}
    for bad, words in (({"prompt": b"a", "response": b"b"}, "row 1: 'prompt' is bytes; expected a string"),
                       ({"image": {"bytes": b"\x89PNG", "path": None}, **good}, "row 1: 'image' would be lost"),
                       ({"prompt": "a", "response": 3}, "row 1: 'response' is int")):
        path = write_parquet(tmp_path / "a.parquet", [bad])
        with pytest.raises(UserError) as error:
            data.load_samples(path, tokenizer)
        assert f"{path}: {words}" in str(error.value)
    path = write_parquet(tmp_path / "a.parquet", [good, good, {"prompt": "a", "response": None}])
    with pytest.raises(UserError, match=r"a\.parquet: row 3: the keys are 'prompt', 'response' \(empty\)"):
        data.load_samples(path, tokenizer)
    path = write_parquet(tmp_path / "none.parquet", [good])
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(path).slice(0, 0), path)
    with pytest.raises(UserError, match="no rows"):
        data.load_samples(path, tokenizer)
    # Bytes that are no UTF-8, in a column that says it holds text.
    strings = pyarrow.array([b"\xff", b"b"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"prompt": strings, "response": ["c", "d"]}), path)
    with pytest.raises(UserError, match=r"none\.parquet: .*utf-8"):
        data.load_samples(path, tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("content", [b"PAR1\x15\x04\x15\x15\x00PAR1", b"", b'{"prompt": "a", "response": "b"}\n', b"PAR1" + bytes(5000)])
def test_what_is_no_parquet_is_named_so(content, tmp_path, tokenizer):
    (tmp_path / "fake.parquet").write_bytes(content)
    with pytest.raises(UserError, match=r"fake\.parquet: not parquet"):
        data.load_samples(tmp_path / "fake.parquet", tokenizer)


@pytest.mark.slow
def test_a_damaged_parquet_file_is_refused(tmp_path, tokenizer):
    path = write_parquet(tmp_path / "a.parquet", ROWS * 1000, row_group_size=1000)
    content = path.read_bytes()
    for damaged in (content[:-20], content[:100], content[:300] + bytes(200) + content[500:]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"a\.parquet: "):
            data.load_samples(path, tokenizer)


def test_without_pyarrow_the_command_that_installs_it_is_named(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r'pip install -e "\.\[parquet\]"'):
        data.load_samples(tmp_path / "a.parquet", tokenizer)


@pytest.mark.slow
def test_parquet_is_read_in_batches(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [{"text": "x" * 10_000 + str(i)} for i in range(10_000)], row_group_size=1000)
    tracemalloc.start()
    assert sum(1 for _ in runtime.rows.read_rows(path)) == 10_000
    assert tracemalloc.get_traced_memory()[1] < 40_000_000                # of 100 MB
    tracemalloc.stop()


# ---------------------------------------------------------------------------------------------------------------------
# Other files

LINE = '{"prompt": "a", "response": "b"}\n'
CSV = "question,answer\nWhat?,That.\n"


@pytest.mark.parametrize("name, content, words", [
    ("a.jsonl", LINE.encode("utf-16"), "UTF-16; convert it: iconv -f UTF-16 -t UTF-8"),
    ("a.jsonl", b"\xfe\xff" + LINE.encode("utf-16-be"), "UTF-16; convert it: iconv -f UTF-16 -t UTF-8"),
    ("a.jsonl", LINE.encode("utf-16-le"), "UTF-16; convert it: iconv -f UTF-16LE -t UTF-8"),
    ("a.json", f"[{LINE}]".encode("utf-16-be"), "UTF-16; convert it: iconv -f UTF-16BE -t UTF-8"),
    ("a.jsonl.gz", gzip.compress(LINE.encode("utf-16"), mtime=0), "UTF-16"),
    ("a.csv", CSV.encode(), "CSV"),
    ("a.jsonl", CSV.encode(), "CSV"),
    ("a.jsonl", b'"question";"answer"\n', "CSV"),
    ("a.tsv", b"question\tanswer\n", "CSV"),
    ("a.csv", b"text\nhello\n", "CSV"),
    ("a.jsonl", b"PAR1\x15\x04", "parquet; give it a name that ends in .parquet"),
    ("a.json", b"PAR1\x15\x04", "parquet; give it a name that ends in .parquet"),
    ("a.jsonl", gzip.compress(LINE.encode(), mtime=0), "gzip; give it a name that ends in .gz"),
    ("a.json", b"PK\x03\x04\x14\x00", "a zip archive"),
    ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "a Git LFS pointer"),
    ("a.json", b"\n<!DOCTYPE html>\n<html>", "a web page"),
])
def test_another_kind_of_file_is_named_as_what_it_is(name, content, words, tmp_path, tokenizer):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        data.load_samples(tmp_path / name, tokenizer)
    assert f"{tmp_path / name}: this is {words}" in str(error.value) and "JSONL" in str(error.value)


def test_jsonl_whose_first_line_has_commas_is_no_csv(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('\n\n {"prompt": "a, b; c", "response": "d\\te, f"}\n')
    assert len(data.load_samples(tmp_path / "a.jsonl", tokenizer)[0]) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Several files

def test_files_follow_one_another_and_errors_name_the_right_one(tmp_path, tokenizer):
    a, b, c = tmp_path / "a.jsonl", tmp_path / "b.json", tmp_path / "c.jsonl"
    a.write_bytes(as_jsonl(ROWS[:2]))
    b.write_bytes(json.dumps(ROWS[2:]).encode())
    alone = ids_of(data.load_samples(a, tokenizer)[0]) + ids_of(data.load_samples(b, tokenizer)[0])
    samples, counts = data.load_samples([a, b], tokenizer)
    assert ids_of(samples) == alone and counts["samples"] == 5
    assert [sample.where for sample in samples] == [f"{a}:1", f"{a}:2", f"{b}: row 1", f"{b}: row 2", f"{b}: row 3"]
    turned, _ = data.load_samples((str(b), str(a)), tokenizer)
    assert ids_of(turned) == alone[2:] + alone[:2]
    c.write_text('{"prompt": "a"}\n')
    with pytest.raises(UserError) as error:
        data.load_samples([a, b, c], tokenizer)
    assert str(error.value).startswith(f"{c}:1: ")
    with pytest.raises(UserError, match=f"{a}, {b}: no sample has a response token within 1 tokens"):
        data.load_samples([a, b], tokenizer, max_length=1)
    with pytest.raises(UserError, match="no such file"):
        data.load_samples([a, tmp_path / "missing.jsonl"], tokenizer)


def test_the_command_takes_several_files(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.jsonl").write_bytes(as_jsonl(ROWS[:1]))
    (tmp_path / "b.json").write_text(json.dumps(ROWS[1:]))
    monkeypatch.setattr(sys, "argv", ["data.py", str(tmp_path / "a.jsonl"), str(tmp_path / "b.json"), "--tokenizer", str(ASSETS)])
    data.main()
    out = capsys.readouterr().out
    assert f"--- {tmp_path / 'a.jsonl'}:1: " in out and f"--- {tmp_path / 'b.json'}: row 1: " in out and "5 samples" in out
