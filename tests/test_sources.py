"""Documents and rows from files: what is read, and that every damage is named with its file and line."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllm.data import Document, Row, read_documents, read_rows, sources

pyarrow = pytest.importorskip("pyarrow")

NEWS = [("体育", "绝杀, 称雄"), ("财经", '棉花 "预计" 738万吨'), ("体育", "首位")]
FIELDS = [{"text": text, "label": label} for label, text in NEWS]


def pack(path, data: bytes) -> None:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(data))
    elif path.suffix == ".zst":
        path.write_bytes(pyarrow.Codec("zstd").compress(data).to_pybytes())
    else:
        path.write_bytes(data)


def news(path, header: bool = True) -> None:
    """NEWS in the format that the name of the file says."""
    ending = path.name.split(".")[1]
    out = io.StringIO()
    if ending == "jsonl":
        out.write("".join(json.dumps({"id": 1, "text": text, "label": label}) + "\n" for label, text in NEWS))
    elif ending == "csv":
        csv.writer(out).writerows([("label", "id", "Text")][: header * 1] + [(label, 1, text) for label, text in NEWS])
    else:
        out.write("text\tlabel\n" * header + "".join("\t".join(row[:: -1 if header else 1]) + "\r\n" for row in NEWS))
    pack(path, out.getvalue().encode())


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".tsv"])
def test_rows_of_every_format(tmp_path, ending, packed):
    path = tmp_path / f"news{ending}{packed}"
    news(path)
    rows = list(read_rows(path, "labelled"))
    assert [row.fields for row in rows] == FIELDS
    first = 1 if ending == ".jsonl" else 2
    assert [row.place for row in rows] == [f"{path}:{first + i}" for i in range(3)]
    assert [document.text for document in read_documents(str(path))] == [text for _, text in NEWS]


def test_parquet_and_numbers_for_labels(tmp_path):
    import pyarrow.parquet

    path = tmp_path / "news.parquet"
    table = pyarrow.table({"class": [3, 0, 3], "id": [1, 2, 3], "content": [text for _, text in NEWS]})
    pyarrow.parquet.write_table(table, path, row_group_size=2)
    assert list(read_rows(path, "labelled"))[1] == Row({"label": "0", "text": NEWS[1][1]}, f"{path}:2")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"news.parquet is damaged, or no Parquet file"):
        list(read_rows(path, "labelled"))


def test_datasets():
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["财经", "体育"])}
    )
    rows = {"text": [text for _, text in NEWS], "label": [label for label, _ in NEWS]}
    dataset = datasets.Dataset.from_dict(rows, features=features)
    assert [row.fields for row in read_rows(dataset, "labelled")] == FIELDS
    assert [document.text for document in read_documents(dataset.to_iterable_dataset())] == rows["text"]
    with pytest.raises(ValueError, match="a DatasetDict has several parts, train: choose one"):
        list(read_rows(datasets.DatasetDict(train=dataset), "labelled"))


def test_a_file_without_a_header_goes_by_position(tmp_path):
    path = tmp_path / "news.tsv"
    news(path, header=False)
    assert [row.fields for row in read_rows(path, "labelled")] == FIELDS
    assert next(read_rows(path, "labelled", {"text": 0, "label": 1})).fields == {"text": "体育", "label": "绝杀, 称雄"}
    assert next(read_rows(path, "pair")).fields == {"source": "体育", "target": "绝杀, 称雄"}
    assert next(read_rows(path, "qa")).fields == {"question": "体育", "answer": "绝杀, 称雄", "context": ""}
    path.write_text('who?\tme\t"quotes" are text\n\nand?\tyou\t\n')
    rows = [(row.fields["context"], row.place) for row in read_rows(path, "qa")]
    assert rows == [('"quotes" are text', f"{path}:1"), ("", f"{path}:3")]
    with pytest.raises(ValueError, match=r"news.tsv:1 is no header.* should be 2 columns \(source, target\), not 3"):
        list(read_rows(path, "pair"))


def test_columns_by_name(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('body,kind,text\n"line\nline",x,unused\nshort,y,unused\n')
    rows = list(read_rows(path, "labelled", {"text": "body", "label": "kind"}))
    assert rows == [
        Row({"label": "x", "text": "line\nline"}, f"{path}:2"),
        Row({"label": "y", "text": "short"}, f"{path}:4"),
    ]


BAD = {
    "a.jsonl": [
        (b'{"text": "a", "label": "x"}\n{"text": ', r"a.jsonl:2 is not JSON"),
        (b'["text"]', r"a.jsonl:1 is not a JSON object: \[\"text\"\]"),
        (
            b'{"text": "a", "kind": 1}',
            r"a.jsonl:1 has no column label \(label, class, category\): there are text, kind",
        ),
        (
            b'{"text": "a", "label": 1}\n{"label": 1}',
            r"a.jsonl:2 has no column text \(text, .*\): there are label",
        ),
        (b'{"text": "a", "label": 1}\n\n{"text": " ", "label": 1}', r"a.jsonl:3: text is empty"),
        (b'{"text": ["a"], "label": 1}', r"a.jsonl:1: text is no text but \['a'\]"),
        (b'{"text": "a\\ud800", "label": 1}', r"a.jsonl:1: text is not Unicode text, it has '\\ud800' at character 1"),
        (b'{"text": "a", "content": "b", "label": 1}', "a.jsonl:1 has several columns for text, text and content"),
        (b'{"text": "a", "label": 1}\n{"text": "\xff', r"a.jsonl:2 is not UTF-8 text: byte 0xff"),
        (b"[" * 100_000, r"a.jsonl:1 is not JSON"),
        (b"\n\n", r"a.jsonl has no rows"),
        (b"", r"a.jsonl is empty"),
        ("\ufeff".encode(), r"a.jsonl is empty"),
        ('{"text": "a"}\n'.encode("UTF-16"), r"a.jsonl is UTF-16LE: convert it to UTF-8"),
    ],
    "a.tsv": [
        (b"text\tlabel\na\tx\nb\n", r"a.tsv:3 has 1 cells, the first line has 2"),
        (b"x\ta\nx\ta\tb\n", r"a.tsv:2 has 3 cells, the first line has 2"),
        (b"text\tsentiment\na\tx\n", r"a.tsv:2 has no column label .* there are text, sentiment"),
        (b"x\ta\nx\t\n", r"a.tsv:2: text is empty"),
        (b"text\ttext\n", r"a.tsv:1 names a column twice: text, text"),
        (b"text\tlabel\n", r"a.tsv has no rows"),
    ],
    "a.csv": [(b'text,label\na,x\n"b,y\nc,z\n', r"a.csv:3 is not CSV: unexpected end of data")],
    "a.txt": [(b"text", r"a.txt: rows of the kind labelled come from files that end in .jsonl")],
    "a.jsonl.gz": [(gzip.compress(b'{"text": "a", "label": 1}\n' * 999)[:-10], r"a.jsonl.gz is truncated or damaged")],
    "b.jsonl.gz": [(b"text", r"b.jsonl.gz is truncated or damaged: Not a gzipped file")],
}


@pytest.mark.parametrize(("name", "data", "message"), [(n, d, m) for n, cases in BAD.items() for d, m in cases])
def test_what_is_wrong_is_named_with_file_and_line(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        list(read_rows(tmp_path / name, "labelled"))


def test_a_truncated_zst_is_an_error(tmp_path):
    path = tmp_path / "a.txt.zst"
    path.write_bytes(pyarrow.Codec("zstd").compress(bytes(range(65, 91)) * 999).to_pybytes()[:-4])
    with pytest.raises(ValueError, match=r"a.txt.zst is truncated or damaged"):
        list(read_documents(path))


def test_arguments():
    with pytest.raises(ValueError, match="kind must be one of text, labelled, pair, qa, got 'rows'"):
        list(read_rows("a.csv", "rows"))
    with pytest.raises(ValueError, match="rows of the kind pair have the fields source, target, not 'text'"):
        list(read_rows("a.csv", "pair", {"text": "body"}))
    with pytest.raises(ValueError, match=r"a.jsonl: columns have numbers in .csv and .tsv files only"):
        list(read_rows("a.jsonl", "text", {"text": 0}))
    with pytest.raises(ValueError, match=r"a.txt is text without columns, but columns are given: {'text': 'body'}"):
        list(read_documents("a.txt", {"text": "body"}))
    with pytest.raises(ValueError, match="the name of a file must not be empty"):
        list(read_documents(""))
    with pytest.raises(ValueError, match="no files to read"):
        list(read_documents([]))


def test_folders_and_globs(tmp_path):
    for name in ("b/2.txt", "b/1.jsonl", "a.txt", "b/image.png", "c.txt.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pack(tmp_path / name, b'{"text": "1"}' if "json" in name else name.encode())
    with pytest.warns(UserWarning, match=r"1 of 5 files are passed over, .*b/image.png among them"):
        documents = list(read_documents(tmp_path))
    assert [document.text for document in documents] == ["a.txt", "1", "b/2.txt", "c.txt.gz"]
    assert [d.text for d in read_documents(str(tmp_path / "**/*.txt"))] == ["a.txt", "b/2.txt"]
    assert [d.text for d in read_documents([tmp_path / "b/2.txt", str(tmp_path / "a.txt")])] == ["b/2.txt", "a.txt"]
    assert sources.text_bytes([tmp_path / "b/2.txt", tmp_path / "a.txt"]) == 12
    assert sources.text_bytes(str(tmp_path / "c*")) is sources.text_bytes(tmp_path / "b/1.jsonl") is None
    with pytest.raises(FileNotFoundError, match=r"no file matches .*\*.tsv"):
        list(read_documents(str(tmp_path / "*.tsv")))
    with pytest.raises(FileNotFoundError):
        list(read_documents(tmp_path / "nowhere.txt"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty has no files that end in .txt, .jsonl"):
        list(read_documents(tmp_path / "empty"))


def test_documents_of_a_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\r\n\n<|endoftext|>\r\ntwo<|endoftext|> three<|endoftext|>\n\n".encode())
    assert list(read_documents(path)) == [
        Document("one\r\n\n", True, f"{path}:1"),
        Document("two", True, f"{path}:4"),
        Document(" three", True, f"{path}:4"),
    ]
    for text, line in (("a<|endoftext|>\n\n<|endoftext|>b", 2), (" \n ", 1)):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"a.txt:{line}: the document is empty"):
            list(read_documents(path))
    path.write_bytes(b"a\nb\n\xffc")
    with pytest.raises(ValueError, match=r"a.txt:3 is not UTF-8 text: byte 0xff"):
        list(read_documents(path))
    path.write_bytes(("汉" * 9).encode()[:-1])
    with pytest.raises(ValueError, match=r"a.txt:1 is not UTF-8 text: byte 0xe6"):
        list(read_documents(path))


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.text("ab \n汉<|", min_size=1, max_size=60).filter(str.strip), min_size=1, max_size=5),
    st.integers(1, 30),
)
def test_parts_come_to_the_text(tmp_path_factory, texts, chunk):
    """Wherever pieces end and parts are cut."""
    path = tmp_path_factory.mktemp("parts") / "a.txt"
    path.write_text("<|endoftext|>\n".join(texts), newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_CHUNK", chunk)
        patch.setattr(sources, "PART", 16)
        parts = list(read_documents(path))
        rows = list(read_rows(path, "text"))
    assert [row.fields["text"] for row in rows] == texts
    assert sum(part.last for part in parts) == len(texts)
    assert "".join(part.text for part in parts) == "".join(texts)
    assert all(part.text for part in parts)
    assert all(len(part.text) <= 16 for part in parts if not part.last)


def test_a_long_document_is_cut_at_line_ends_and_never_whole_in_memory(tmp_path):
    path = tmp_path / "a.txt.gz"
    line = "0123456789 " * 9 + "\n"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(20):
            file.write(line.encode() * 20_000)  # 40 MB in all
    tracemalloc.start()
    number, lines = 0, 0
    for part in read_documents(path):
        assert part.last or part.text.endswith("\n")
        assert part.place == f"{path}:{lines + 1}"
        number += 1
        lines += part.text.count("\n")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert lines == 400_000
    assert number == 10
    assert peak < 25e6


def test_keys_of_jsonl_may_differ_from_row_to_row(tmp_path):
    rows = [{"question": "q", "answer": "a"}, {"question": "p", "answer": "b", "context": "c"}]
    for order in (rows, rows[::-1]):
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in order))
        found = [row.fields for row in read_rows(tmp_path / "a.jsonl", "qa")]
        assert found == [{"context": "", **row} for row in order]


def test_linked_folders_are_read_and_dead_links_named(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/b.txt").write_text("b")
    (tmp_path / "a/a.txt").write_text("a")
    (tmp_path / "a/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "a/up").symlink_to(tmp_path / "a")
    assert [document.text for document in read_documents(tmp_path / "a")] == ["a", "b"]
    (tmp_path / "a/dead.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"dead.txt"):
        list(read_documents(tmp_path / "a"))
