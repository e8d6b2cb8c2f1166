from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from avatarl.data import PreparedData, corpus, prepare
from avatarl.errors import UserError

from .conftest import story


def split_documents(data: PreparedData, split: str) -> list[str]:
    """The documents of a split, decoded."""
    stream = getattr(data, split)
    ids = stream.slice(0, len(stream))
    parts = np.split(ids, np.flatnonzero(ids == data.end_of_text_id) + 1)
    tokenizer = data.load_tokenizer()
    return [tokenizer.decode(part[part != data.end_of_text_id]) for part in parts if len(part)]


def write_stories(path: Path, count: int) -> Path:
    path.write_text("<|endoftext|>\n".join(story(number) for number in range(count)))
    return path


def write_nanogpt(folder: Path, tokenizer: Path, train: list[int], valid: list[int]) -> Path:
    folder.mkdir()
    np.array(train, dtype="<u2").tofile(folder / "train.bin")
    np.array(valid, dtype="<u2").tofile(folder / "val.bin")
    return folder


def test_every_document_comes_back_and_belongs_to_one_split(prepared):
    train, valid = split_documents(prepared, "train"), split_documents(prepared, "valid")
    assert sorted(train + valid) == sorted(story(number) for number in range(40))
    assert prepared.manifest["documents"] == {"train": len(train), "valid": len(valid)}
    assert min(len(train), len(valid)) >= 1
    assert prepared.manifest["valid_rule"].startswith("whole documents")
    sizes = {"train": sum(map(len, train)), "valid": sum(map(len, valid))}
    assert prepared.manifest["utf8_bytes"] == sizes
    assert prepared.manifest["characters"] == sum(sizes.values())


def test_the_manifest_describes_every_file(prepared):
    on_disk = {path.relative_to(prepared.path).as_posix() for path in prepared.path.rglob("*") if path.is_file()}
    assert set(prepared.manifest["files"]) == on_disk - {"manifest.json"}
    assert json.loads((prepared.path / "manifest.json").read_text()) == prepared.manifest
    shards = [name for name in on_disk if name.startswith("train-")]
    assert len(shards) > 2
    assert max((prepared.path / name).stat().st_size for name in shards) == 500 * 2


def test_two_preparations_are_the_same_byte_for_byte(stories_file, tmp_path):
    digests = set()
    for name in ("first", "second"):
        prepare([str(stories_file)], tmp_path / name, tokenizer="bpe:300", quiet=True)
        digests.add(PreparedData.open(tmp_path / name).digest)
    assert len(digests) == 1


@pytest.mark.parametrize("fraction", [0.001, 0.05, 0.3, 0.5])
def test_the_share_of_validation_is_about_what_was_asked_for(tmp_path, fraction):
    source = write_stories(tmp_path / "a.txt", 400)
    manifest = prepare([str(source)], tmp_path / "out", tokenizer="bpe:300", valid_fraction=fraction, quiet=True)
    share = manifest["documents"]["valid"] / 400
    assert manifest["documents"]["valid"] >= 1
    assert share == pytest.approx(fraction, abs=0.06)


def test_one_long_document_among_twenty_does_not_become_the_validation(tmp_path):
    for long in range(20):
        texts = [story(number, words=3000 if number == long else 20) for number in range(20)]
        source = tmp_path / f"{long}.txt"
        source.write_text("<|endoftext|>\n".join(texts))
        manifest = prepare([str(source)], tmp_path / f"out{long}", tokenizer="bpe:257", quiet=True)
        assert 1 <= manifest["documents"]["valid"]
        assert manifest["tokens"]["valid"] <= 0.06 * sum(manifest["tokens"].values())


@pytest.mark.parametrize("count", [1, 2, 19])
def test_few_documents_are_cut_at_the_tail(tmp_path, count):
    source = write_stories(tmp_path / "a.txt", count)
    manifest = prepare(
        [str(source)], tmp_path / "out", tokenizer="bpe:300", valid_fraction=0.1, shard_tokens=64, quiet=True
    )
    data = PreparedData.open(tmp_path / "out")
    total = len(data.train) + len(data.valid)
    assert len(data.valid) == round(0.1 * total)
    assert manifest["valid_rule"] == "the last part of the tokens"
    assert sum(manifest["documents"].values()) == count
    text = "".join(story(number) for number in range(count))
    tail = "".join(split_documents(data, "valid"))
    assert text.endswith(tail)
    assert manifest["utf8_bytes"] == {"train": len(text) - len(tail), "valid": len(tail)}
    assert not list(data.path.glob("waiting*"))


def test_a_document_that_begins_at_the_cut_is_validation(tmp_path, prepared):
    (tmp_path / "a.txt").write_text("one two\n<|endoftext|>\none two\n")
    settings = {"tokenizer": str(prepared.path / "tokenizer"), "valid_fraction": 0.5, "quiet": True}
    manifest = prepare([str(tmp_path / "a.txt")], tmp_path / "out", **settings)
    assert manifest["documents"] == {"train": 1, "valid": 1}, manifest["tokens"]


def test_an_end_of_text_inside_a_line_does_not_end_a_document(tmp_path):
    source = tmp_path / "a.txt"
    source.write_text("one <|endoftext|> two\n" * 30)
    prepare([str(source)], tmp_path / "out", tokenizer="bpe:300", quiet=True)
    data = PreparedData.open(tmp_path / "out")
    ids = np.concatenate([data.train.slice(0, len(data.train)), data.valid.slice(0, len(data.valid))])
    assert (ids == data.end_of_text_id).sum() == 1
    assert data.load_tokenizer().decode(ids[:-1]) == source.read_text()


def test_pieces_do_not_change_what_is_written(tmp_path, monkeypatch):
    source = write_stories(tmp_path / "a.txt", 25)
    prepare([str(source)], tmp_path / "whole", tokenizer="bpe:300", quiet=True)
    monkeypatch.setattr(corpus, "PIECE_CHARACTERS", 50)
    prepare([str(source)], tmp_path / "pieces", tokenizer=str(tmp_path / "whole" / "tokenizer"), quiet=True)
    for name in ("train-00000.bin", "valid-00000.bin"):
        assert (tmp_path / "pieces" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.fixture(scope="module")
def large_tokenizer(tmp_path_factory) -> str:
    """The words w0 to w69999, the first of them for all others."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tokenizer") / "words"
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(70_000)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0").save_pretrained(folder)
    return str(folder)


def test_a_large_vocabulary_is_written_in_four_bytes(tmp_path, large_tokenizer):
    (tmp_path / "a.txt").write_text(" ".join(f"w{i}" for i in range(69_000, 70_000)))
    manifest = prepare([str(tmp_path / "a.txt")], tmp_path / "out", tokenizer=large_tokenizer, quiet=True)
    data = PreparedData.open(tmp_path / "out")
    assert manifest["dtype"] == "uint32"
    assert data.end_of_text_id is None
    assert data.train.slice(0, 950).tolist() == list(range(69_000, 69_950))
    assert data.valid.slice(0, 50).tolist() == list(range(69_950, 70_000))


def test_nanogpt_files_keep_their_ids_and_their_split(prepared, tmp_path):
    tokenizer, end = prepared.path / "tokenizer", prepared.end_of_text_id
    train, valid = [*range(300), end] * 3, [5, 6, end]
    source = write_nanogpt(tmp_path / "nano", tokenizer, train, valid)
    manifest = prepare([str(source)], tmp_path / "out", tokenizer=str(tokenizer), shard_tokens=100, quiet=True)
    data = PreparedData.open(tmp_path / "out")
    assert data.train.slice(0, len(data.train)).tolist() == train
    assert data.valid.slice(0, len(data.valid)).tolist() == valid
    assert manifest["documents"] == {"train": train.count(end), "valid": 1}
    assert manifest["utf8_bytes"]["valid"] == 2


def test_nanogpt_files_that_cannot_be_used_are_refused(prepared, tmp_path, monkeypatch):
    tokenizer = str(prepared.path / "tokenizer")
    source = write_nanogpt(tmp_path / "nano", prepared.path, [1, 2, 300], [1])

    def refuse(message, sources=(str(source),), spec=tokenizer):
        with pytest.raises(UserError, match=message):
            prepare(list(sources), tmp_path / "out", tokenizer=spec, quiet=True)
        assert not list(tmp_path.glob("*out*"))

    refuse("train.bin: holds token id 300, read as 2 bytes for every token; the tokenizer has ids below 300")
    refuse("tokenizer 'bpe:500': .* holds token ids and no text to train on; accepted are gpt2", spec="bpe:500")
    refuse("cannot be joined with other sources", sources=(str(source), "python-docs"))
    (source / "val.bin").write_bytes(b"\1\0\2")
    refuse("val.bin: has 3 bytes; 2 for every token")
    (source / "val.bin").write_bytes(b"\1\0\2\0\x2c\1")
    refuse("val.bin: holds the same tokens as train.bin; a validation part of its own is expected")
    (source / "val.bin").write_bytes(b"\1\0")
    (source / "meta.pkl").write_bytes(b"cos\nabort\n(tR.")  # would end the process if it were ever unpickled
    refuse("meta.pkl: says that the ids beside it are of a vocabulary of their own, .*; prepare the text")
    (source / "meta.pkl").unlink()

    def unreachable(name, **_):
        raise OSError(name)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", unreachable)
    refuse("tokenizer 'gpt2': openai-community/gpt2 cannot be had", spec="bpe:4096")


@pytest.mark.parametrize("width", [4, 8])
def test_nanogpt_files_of_wider_ids_are_never_taken_for_more_tokens(prepared, tmp_path, width):
    (source := tmp_path / "nano").mkdir()
    np.array([*range(300)] * 3, dtype=f"<u{width}").tofile(source / "train.bin")
    np.array([5, 6, 7], dtype=f"<u{width}").tofile(source / "val.bin")
    with pytest.raises(UserError, match=f"train.bin: holds ids of {width} bytes each; nanoGPT's have 2"):
        prepare([str(source)], tmp_path / "out", tokenizer=str(prepared.path / "tokenizer"), quiet=True)


@pytest.mark.parametrize("dtype", ["<u4", "<u2"])
def test_a_vocabulary_above_65536_cannot_lie_in_two_bytes(tmp_path, large_tokenizer, dtype):
    (source := tmp_path / "nano").mkdir()
    ids = np.arange(60_000, 61_000) if dtype == "<u2" else np.arange(69_000, 70_000)
    ids[:900].astype(dtype).tofile(source / "train.bin")
    ids[900:].astype(dtype).tofile(source / "val.bin")
    with pytest.raises(UserError, match="train.bin: ids below 70000 do not fit the 2 bytes.*llm.c's header"):
        prepare([str(source)], tmp_path / "out", tokenizer=large_tokenizer, quiet=True)


@pytest.mark.parametrize(("magic", "version", "width"), [(20240520, 1, 2), (20240801, 7, 4)])
def test_the_header_of_llm_c_is_read_and_is_no_text(prepared, tmp_path, magic, version, width):
    source, tokenizer = tmp_path / "nano", str(prepared.path / "tokenizer")
    source.mkdir()

    def write(name, ids, **header):
        said = {"magic": magic, "version": version, "tokens": len(ids)} | header
        head = np.zeros(256, dtype="<i4")
        head[:3] = list(said.values())
        (source / name).write_bytes(head.tobytes() + np.array(ids, dtype=f"<u{width}").tobytes())

    write("train.bin", [*range(300)])
    write("val.bin", [7, 8])
    manifest = prepare([str(source)], tmp_path / "out", tokenizer=tokenizer, quiet=True)
    assert manifest["tokens"] == {"train": 300, "valid": 2}
    assert PreparedData.open(tmp_path / "out").train.slice(0, 300).tolist() == [*range(300)]
    for wrong in ({"tokens": 299}, {"tokens": -1}, {"version": 3}):
        write("train.bin", [*range(300)], **wrong)
        with pytest.raises(UserError, match=f"train.bin: has llm.c's header of magic {magic}.*; version {version} and"):
            prepare([str(source)], tmp_path / "again", tokenizer=tokenizer, quiet=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sources": []}, "sources: none given"),
        ({"valid_fraction": 0}, "valid_fraction: found 0; a number above 0 and at most 0.5"),
        ({"valid_fraction": 0.6}, "valid_fraction: found 0.6"),
        ({"valid_fraction": float("nan")}, "valid_fraction: found nan"),
        ({"shard_tokens": 0}, "shard_tokens: found 0"),
        ({"tokenizer": "bpe:10"}, "tokenizer 'bpe:10'"),
        ({"text_field": "txt"}, "no field 'txt'; found 'text'"),
    ],
)
def test_a_refusal_leaves_nothing_behind(stories_file, tmp_path, settings, message):
    out = tmp_path / "made" / "for" / "out"
    with pytest.raises(UserError, match=message):
        prepare(**({"sources": [str(stories_file)], "out": out, "quiet": True, "tokenizer": "bpe:300"} | settings))
    assert list(tmp_path.iterdir()) == [stories_file]


def test_a_failure_halfway_leaves_nothing_behind(tmp_path, prepared):
    before = set(tmp_path.rglob("*"))
    good, bad = tmp_path / "stories.jsonl", tmp_path / "bad.txt"
    bad.write_bytes(b"fine\n" * 10 + b"\xff")
    with pytest.raises(UserError, match=r"bad\.txt: not UTF-8 at byte 50"):
        prepare([str(good), str(bad)], tmp_path / "out", tokenizer=str(prepared.path / "tokenizer"), quiet=True)
    assert set(tmp_path.rglob("*")) == before | {bad}


def test_an_existing_folder_is_refused_and_untouched_but_an_empty_one_is_used(stories_file, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    prepare([str(stories_file)], out, tokenizer="bpe:300", quiet=True)
    before = (out / "manifest.json").read_bytes()
    with pytest.raises(UserError, match="out: .*out exists and is not empty; a new or empty folder is expected"):
        prepare([str(stories_file)], out, tokenizer="bpe:400", quiet=True)
    assert (out / "manifest.json").read_bytes() == before
    with pytest.raises(UserError, match="exists and is not empty"):
        prepare([str(stories_file)], stories_file, tokenizer="bpe:300", quiet=True)


def test_what_is_left_out_is_said_and_kept(tmp_path, prepared, capfd):
    folder = tmp_path / "corpus"
    folder.mkdir()
    source = write_stories(folder / "a.txt", 30)
    (folder / "picture.png").write_bytes(b"")
    settings = {"tokenizer": str(prepared.path / "tokenizer")}
    manifest = prepare([str(folder), str(source)], tmp_path / "out", **settings)
    assert manifest["left_out"] == {
        str(folder): {"of an unknown kind": 1},
        str(source): {"already read (named twice)": 1},
    }
    assert manifest == json.loads((tmp_path / "out" / "manifest.json").read_text())
    said = capfd.readouterr().err
    assert f"source '{folder}': files and folders left out: 1 of an unknown kind" in said
    assert f"source '{source}': files and folders left out: 1 already read (named twice)" in said
    once = prepare([str(source)], tmp_path / "once", **settings)
    assert once["files"] == manifest["files"] and "left_out" not in once
    assert capfd.readouterr().err == ""  # nothing lost, nothing repeated


def test_an_out_that_is_not_utf8_is_refused_before_any_work(stories_file, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "read_parts", None)
    with pytest.raises(UserError, match=r"out is .*caf\\udce9, which is not UTF-8; a path in UTF-8 is expected"):
        prepare([str(stories_file)], tmp_path / "caf\udce9", tokenizer="bpe:300", quiet=True)


def test_progress_goes_to_stderr_and_can_be_silenced(stories_file, tmp_path, capfd, monkeypatch):
    prepare([str(stories_file)], tmp_path / "quiet", tokenizer="bpe:9000", quiet=True)
    assert capfd.readouterr() == ("", "")
    prepare([str(stories_file)], tmp_path / "in a file", tokenizer="bpe:9000")
    out, err = capfd.readouterr()
    assert out == ""
    assert "fewer than the 9000 asked for" in " ".join(err.split())
    assert "tokens/s" not in err  # a bar is for a terminal
    monkeypatch.setenv("FORCE_COLOR", "1")
    prepare([str(stories_file)], tmp_path / "on a terminal", tokenizer="bpe:9000")
    assert "tokens/s" in capfd.readouterr().err


@pytest.mark.slow
def test_memory_does_not_grow_with_the_text(prepared, tmp_path):
    source = tmp_path / "large.txt"
    line = story(3, words=400).replace("\n", " ")
    with source.open("w") as file:
        while file.tell() < 60_000_000:
            file.write(line)
    tracemalloc.start()
    try:
        prepare([str(source)], tmp_path / "out", tokenizer=str(prepared.path / "tokenizer"), quiet=True)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 150_000_000
