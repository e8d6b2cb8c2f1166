from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet
import pytest

from avatarl.data import corpus
from avatarl.data.corpus import document_pieces, hub_name
from avatarl.errors import UserError


def read(*sources, text_field: str = "text") -> list[str]:
    """The documents of the sources, whole."""
    documents, parts = [], []
    for piece in document_pieces([str(source) for source in sources], text_field):
        parts.append(piece.text)
        if piece.ends_document:
            documents.append("".join(parts))
            parts = []
    assert not parts, "the last document was never ended"
    return documents


def write(path, content: bytes):
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def parquet_bytes(tmp_path, columns: dict) -> bytes:
    pyarrow.parquet.write_table(pa.table(columns), tmp_path / "scratch")
    return (tmp_path / "scratch").read_bytes()


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.txt.gz", "A.TXT"])
def test_a_separator_line_divides_a_text_file(tmp_path, name):
    content = b"one\n<|endoftext|>\ntwo, <|endoftext|> inside\n <|endoftext|>\n<|endoftext|>\n \n<|endoftext|>\n\nthree"
    assert read(write(tmp_path / name, content)) == [
        "one\n",
        "two, <|endoftext|> inside\n <|endoftext|>\n",
        "three",
    ]


def test_a_byte_order_mark_is_dropped_and_line_ends_are_made_one_kind(tmp_path):
    content = "\ufeffone\r\n<|endoftext|>\r\ntwo\rthree\r\n".encode()
    assert read(write(tmp_path / "a.txt", content)) == ["one\n", "two\rthree\n"]


@pytest.mark.parametrize("shift", range(4))
def test_nothing_is_lost_where_a_long_line_is_read_in_parts(tmp_path, monkeypatch, shift):
    monkeypatch.setattr(corpus, "PIECE_CHARACTERS", 16)
    text = "x" * shift + "é€😀 word\r\n" * 50 + "<|endoftext|>?" + "é" * 100
    assert read(write(tmp_path / "a.txt", text.encode())) == [text.replace("\r\n", "\n")]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_json_lines(tmp_path, name):
    rows = [{"text": "one"}, {"text": "  "}, {"text": None}, {"text": "two\n\nparts", "id": 3}]
    content = "\n\n".join(json.dumps(row) for row in rows).encode()
    assert read(write(tmp_path / name, content)) == ["one", "two\n\nparts"]


@pytest.mark.parametrize("name", ["a.parquet", "a.parquet.gz"])
def test_parquet(tmp_path, name):
    content = parquet_bytes(tmp_path, {"body": ["one", None, "two"], "id": [1, 2, 3]})
    assert read(write(tmp_path / name, content), text_field="body") == ["one", "two"]


def test_a_folder_is_read_sorted_and_without_hidden_files(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    for name in ["b.txt", "sub/a.md", "a.txt", ".hidden.txt", ".git/x.txt", "picture.png"]:
        write(tmp_path / name, name.encode())
    assert read(tmp_path) == ["a.txt", "b.txt", "sub/a.md"]


def left_out(*sources) -> dict:
    told = {}
    next(document_pieces([str(source) for source in sources], left_out=told))
    return told


def test_linked_folders_are_read_once_each_and_no_circle_is_followed(tmp_path):
    for folder in ("corpus/books", "elsewhere/deep", "around"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("corpus/b.txt", "corpus/books/c.txt", "elsewhere/d.txt", "elsewhere/deep/e.txt", "beside.txt"):
        write(tmp_path / name, name.encode())
    corpus = tmp_path / "corpus"
    for link, target in {
        "a": "books",  # which keeps its own name, and so its place in the order
        "x": "../elsewhere",
        "y": "../elsewhere/deep",
        "books/loop": ".",
        "books/up": "..",
        "out": "../../" + tmp_path.name,
        "broken": "nowhere",
        "b2.txt": "b.txt",
    }.items():
        (corpus / link).symlink_to(target)
    (corpus / "b3.txt").hardlink_to(corpus / "b.txt")
    expected = ["corpus/b.txt", "corpus/books/c.txt", "elsewhere/d.txt", "elsewhere/deep/e.txt"]
    assert read(corpus) == expected
    (tmp_path / "link").symlink_to("corpus")
    assert read(tmp_path / "link") == expected
    assert left_out(corpus)[str(corpus)] == {
        "already read (named twice)": 4,  # a, y or x/deep, b2.txt, b3.txt
        "links in a circle": 3,
        "links to nowhere": 1,
    }


def test_a_folder_says_what_was_left_out(tmp_path):
    (tmp_path / ".git").mkdir()
    for name in ("a.txt", "b.pdf", "c.zst", ".git/x.txt", ".hidden.txt"):
        write(tmp_path / name, name.encode())
    assert left_out(tmp_path) == {str(tmp_path): {"hidden": 2, "of an unknown kind": 2}}
    assert left_out(tmp_path / "a.txt") == {}


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    write(tmp_path / "a.txt", b"a")

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(UserError, match=r"cannot be read \(Permission denied\)"):
        read(tmp_path)


def test_what_is_named_twice_is_read_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    file = write(tmp_path / "folder" / "a.txt", b"one")
    write(tmp_path / "folder" / "b.txt", b"two")
    (tmp_path / "link.txt").symlink_to(file)
    for again in (file, "folder/a.txt", "folder/../folder/a.txt", "link.txt"):
        assert read(file, again) == ["one"]
        assert left_out(file, again) == {str(again): {"already read (named twice)": 1}}
        assert read("folder", again) == ["one", "two"]
        assert read(again, "folder") == ["one", "two"]
    assert left_out(file, file, file) == {str(file): {"already read (named twice)": 2}}
    monkeypatch.setattr("avatarl.data.corpus.python_documents", lambda: iter(["a document", "another"]))
    assert read("python-docs", "python-docs") == ["a document", "another"]


def test_an_at_sign_in_the_path_of_a_data_set_is_part_of_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "team@lab" / "set@2"
    folder.mkdir(parents=True)
    write(folder / "train.jsonl", b'{"text": "one"}\n')
    for source in (f"hub:{folder}", f"hub:{folder}@default", "hub:team@lab/set@2", "hub:team@lab/set@2@default"):
        assert read(source) == ["one"]
        assert read(f"hub:{folder}", source) == ["one"]  # named twice, read once
    assert hub_name("hub:owner/name@config@x") == ("owner/name", "config@x")
    assert hub_name("hub:owner/name") == ("owner/name", None)


def test_a_local_data_set_is_read_through_the_datasets_library(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", b'{"text": "one"}\n{"text": "two"}\n')
    assert read(f"hub:{folder}") == ["one", "two"]
    with pytest.raises(UserError, match=r"no field 'txt'; found 'text'; did you mean 'text'\?"):
        read(f"hub:{folder}", text_field="txt")
    with pytest.raises(UserError, match="source 'hub:.*nowhere': no such folder, and no id of the Hugging Face Hub"):
        read(f"hub:{tmp_path}/nowhere")
    write(folder / "train.jsonl", b"no JSON")
    with pytest.raises(UserError, match=r"source 'hub:.*set': the datasets library cannot open its train split"):
        read(f"hub:{folder}")


def test_a_data_set_without_network_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")  # where nobody listens
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for offline, found in (False, "Hub cannot be reached"), (True, "cannot open its train split .*Offline"):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", offline)
        with pytest.raises(UserError, match=f"source 'hub:owner/name': .*{found}") as caught:
            read("hub:owner/name")
        assert "\n" not in str(caught.value) and "folder" in str(caught.value).lower()


def test_several_sources_follow_each_other(tmp_path):
    first, second = write(tmp_path / "1.txt", b"one"), write(tmp_path / "2.jsonl", b'{"text": "two"}')
    assert read(second, first) == ["two", "one"]


BAD_FILES = {
    "empty": ("a.txt", b"", "source '{path}': holds no text"),
    "blank": ("a.txt", b" \n\n<|endoftext|>\n", "source '{path}': holds no text"),
    "binary": ("a.txt", b"abc\n\xff\0def", "{path}: binary, not text (a NUL byte at byte 5)"),
    "not UTF-8": ("a.txt", b"abc\ncaf\xe9!\n", "{path}: not UTF-8 at byte 7;"),
    "not UTF-8 after others": ("a.txt", "é漢\n".encode() + b"\xff", "{path}: not UTF-8 at byte 6;"),
    "cut in a character": ("a.txt", b"abc\xe2\x82", "{path}: not UTF-8 at byte 3;"),
    "suffix": ("a.pdf", b"abc", "source '{path}': unknown suffix '.pdf'; accepted are .txt"),
    "bad JSON": ("a.jsonl", b'{"text": "one"}\n{"text": \n', "{path}:2: not a JSON line"),
    "deep JSON": ("a.jsonl", b"[" * 200_000, "{path}:1: not a JSON line"),
    "JSON list": ("a.jsonl", b'["text"]', "{path}:1: found a JSON list; one JSON object a line is expected"),
    "JSON not UTF-8": ("a.jsonl", b'{"text": "\xe9"}', "{path}:1: not UTF-8 at byte 10 of the line"),
    "field": (
        "a.jsonl",
        b'{"txt": "one", "id": 1}',
        "{path}:1: no field 'text'; found 'txt', 'id'; did you mean 'txt'?",
    ),
    "number": ("a.jsonl", b'{"text": 5}', "{path}:1: field 'text' holds a int; a string is expected"),
    "surrogate": (
        "a.jsonl",
        b'{"text": "ab\\ud800"}',
        "{path}:1: field 'text' holds half a surrogate pair at character 2",
    ),
    "not parquet": ("a.parquet", b"not parquet at all", "{path}: not a readable Parquet file"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_file_that_cannot_be_used_is_named(tmp_path, kind):
    name, content, message = BAD_FILES[kind]
    path = write(tmp_path / name, content)
    with pytest.raises(UserError, match=re.escape(message.format(path=path))) as caught:
        read(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["cut", "garbage", "flipped"])
def test_a_corrupt_gzip_file_is_named(tmp_path, damage):
    whole = gzip.compress(b"some text " * 100)
    content = {"cut": whole[:-12], "garbage": b"no gzip", "flipped": whole[:-8] + b"\0\0\0\0" + whole[-4:]}[damage]
    path = tmp_path / "a.txt.gz"
    path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(f"{path}: corrupt gzip file")):
        read(path)


def packed_lines(path: Path) -> None:
    path.write_bytes(gzip.compress(b'{"text": [' + b"[]," * 9_000_000 + b"[]]}"))


def packed_zeros(path: Path) -> None:
    path.write_bytes(gzip.compress(b"0" * 30_000_000))


def one_text_in_many_rows(path: Path) -> None:
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 8000, pa.int32()), pa.array(["x" * 900_000]))
    pyarrow.parquet.write_table(pa.table({"text": column}), path, compression="zstd")


def many_long_texts(path: Path) -> None:
    texts = ["x" * 1_000_000] * 30
    pyarrow.parquet.write_table(pa.table({"text": texts}), path, compression="zstd", use_dictionary=False)


def many_empty_rows(path: Path) -> None:
    pyarrow.parquet.write_table(pa.table({"text": pa.nulls(2_000_000, pa.string())}), path, compression="zstd")


def packed_parquet(path: Path) -> None:
    path.write_bytes(gzip.compress(b"PAR1" * 8_000_000))


@pytest.mark.parametrize(
    ("name", "fill"),
    [
        ("a.jsonl.gz", packed_lines),
        ("a.txt.gz", packed_zeros),
        ("a.parquet", one_text_in_many_rows),
        ("a.parquet", many_long_texts),
        ("a.parquet", many_empty_rows),
        ("a.parquet.gz", packed_parquet),
    ],
)
def test_a_file_that_unpacks_to_more_than_any_text_is_refused(tmp_path, name: str, fill):
    fill(tmp_path / name)
    with pytest.raises(UserError, match=rf"{name}: holds more than [12]\d,\d{{3}},\d{{3}} bytes once unpacked"):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.gz", "a.parquet"])
def test_what_packs_well_is_read(tmp_path, name: str):
    text = "all work and no play makes Jack a dull boy\n" * 200_000  # 8.6 MB in 27 kB
    if name == "a.parquet":
        pyarrow.parquet.write_table(pa.table({"text": pa.array([text], pa.large_string())}), tmp_path / name)
    else:
        write(tmp_path / name, (json.dumps({"text": text}) if "json" in name else text).encode())
    assert read(tmp_path / name) == [text]


def test_a_parquet_column_of_lists_is_named(tmp_path):
    path = write(tmp_path / "a.parquet", parquet_bytes(tmp_path, {"text": [["one"]]}))
    with pytest.raises(UserError, match=r"a\.parquet: field 'text' holds list<.*>; a string is expected"):
        read(path)


def test_a_parquet_file_without_the_column_names_those_it_has(tmp_path):
    path = write(tmp_path / "a.parquet", parquet_bytes(tmp_path, {"texts": ["one"]}))
    with pytest.raises(UserError, match=r"a\.parquet: no field 'text'; found 'texts'; did you mean 'texts'\?"):
        read(path)


def test_a_missing_path_and_a_folder_without_text_are_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere': no such file or folder; accepted are"):
        read(tmp_path / "nowhere")
    with pytest.raises(UserError, match="the folder has no readable file; accepted are"):
        read(tmp_path)


def test_pieces_are_bounded_even_where_there_is_no_place_to_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "PIECE_CHARACTERS", 100)
    monkeypatch.setattr(corpus, "LONGEST_PIECE_CHARACTERS", 400)
    path = write(tmp_path / "a.txt", b"x" * 5000 + b" y" * 500)
    pieces = list(document_pieces([str(path)]))
    assert "".join(piece.text for piece in pieces) == path.read_text()
    assert max(len(piece.text) for piece in pieces) <= 600
    assert [piece.ends_document for piece in pieces] == [False] * (len(pieces) - 1) + [True]


@pytest.mark.parametrize("line", ["  ACGT\n", "漢字。\n\n", "x" * 70 + "\n\n"])
def test_a_place_to_cut_is_looked_for_once(monkeypatch, line: str):
    """Lines that end in none were joined and searched anew with every line: hundreds of seconds for a megabyte."""
    searched, seams = Counter(), corpus.LAST_SEAM

    class Counting:
        def match(self, text: str):
            searched["characters"] += len(text)
            assert searched["characters"] < 2 * 200_000
            return seams.match(text)

    monkeypatch.setattr(corpus, "LAST_SEAM", Counting())
    lines = [line] * (200_000 // len(line))
    lines[-50] = "a b\n"
    (first, last) = corpus._pieces(iter(lines))
    assert first.text.endswith("a") and first.text + last.text == "".join(lines)
