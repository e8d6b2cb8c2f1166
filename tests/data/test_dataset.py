from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from avatarl.data import PreparedData, TokenStream, WindowOrder, Windows
from avatarl.errors import UserError


@pytest.fixture
def stream(tmp_path) -> TokenStream:
    """The numbers 0 to 99 in shards of 7."""
    paths = []
    for start in range(0, 100, 7):
        paths.append(tmp_path / f"train-{start // 7:05d}.bin")
        np.arange(start, min(start + 7, 100), dtype="<u2").tofile(paths[-1])
    return TokenStream(paths, np.dtype("<u2"))


def test_slices_cross_shards(stream):
    assert len(stream) == 100
    for start in range(0, 101, 3):
        for stop in range(start, 101, 5):
            ids = stream.slice(start, stop)
            assert ids.dtype == np.int64
            assert ids.tolist() == list(range(start, stop))


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (5, 4), (90, 101)])
def test_a_slice_beyond_the_stream_is_an_error(stream, start, stop):
    with pytest.raises(IndexError):
        stream.slice(start, stop)


@pytest.mark.parametrize(("block_size", "windows"), [(1, 99), (9, 11), (10, 9), (33, 3), (99, 1)])
def test_windows_do_not_overlap_and_targets_are_inputs_shifted(stream, block_size, windows):
    view = Windows(stream, block_size)
    assert len(view) == windows == (100 - 1) // block_size
    inputs, targets = view.batch(range(windows))
    assert inputs.shape == targets.shape == (windows, block_size)
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.flatten().tolist() == list(range(windows * block_size))
    assert torch.equal(targets, inputs + 1)


def test_windows_come_in_the_order_asked_for(stream):
    inputs, _ = Windows(stream, 10).batch(np.array([8, 0, 3]))
    assert inputs[:, 0].tolist() == [80, 0, 30]
    with pytest.raises(IndexError):
        Windows(stream, 10).batch([9])


def test_a_stream_too_short_for_one_window_is_the_users_to_mend(stream):
    with pytest.raises(UserError, match="block_size: 100 needs at least 101 tokens, but the data split has 100"):
        Windows(stream, 100)
    with pytest.raises(UserError, match="block_size: found 0; a whole number of at least 1"):
        Windows(stream, 0)


def test_a_part_of_the_windows_is_spread_evenly_from_the_first_to_the_last(stream):
    whole = Windows(stream, 9)  # 100 tokens: 11 windows
    part = Windows(stream, 9, count=3)
    assert len(whole) == len(Windows(stream, 9, count=11)) == len(Windows(stream, 9, count=100)) == 11
    assert len(part) == 3
    for found, expected in zip(part.batch([0, 1, 2]), whole.batch([0, 5, 10]), strict=True):
        assert found.equal(expected)
    with pytest.raises(IndexError, match="window 3 of 3"):
        part.batch([3])


def test_every_epoch_is_a_permutation_of_its_own():
    order = WindowOrder(50, seed=1)
    epochs = [order.indices(50 * epoch, 50) for epoch in range(4)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(50))
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert tuple(WindowOrder(50, seed=2).indices(0, 50)) != tuple(epochs[0])


def test_the_order_is_a_pure_function_of_the_position():
    whole = WindowOrder(13, seed=5).indices(0, 100)
    order = WindowOrder(13, seed=5)
    for position, count in [(90, 10), (0, 100), (12, 2), (13, 0), (40, 30), (0, 1)]:
        assert order.indices(position, count).tolist() == whole[position : position + count].tolist()


def test_the_order_never_changes():
    assert WindowOrder(6, seed=0).indices(0, 12).tolist() == [0, 3, 5, 1, 2, 4, 3, 4, 2, 1, 5, 0]


@pytest.mark.parametrize(("windows", "seed", "field"), [(0, 0, "num_windows"), (5, -1, "seed")])
def test_an_order_of_nothing_or_a_negative_seed_is_refused(windows, seed, field):
    with pytest.raises(UserError, match=f"{field}: found"):
        WindowOrder(windows, seed)


def test_a_prepared_folder_opens(prepared):
    assert prepared.vocab_size == len(prepared.load_tokenizer()) == 300
    assert prepared.end_of_text_id == prepared.load_tokenizer().eos_token_id
    assert len(prepared.train) == prepared.manifest["tokens"]["train"]
    assert len(prepared.digest) == 64
    assert PreparedData.open(str(prepared.path)).digest == prepared.digest
    with pytest.raises(AttributeError):
        prepared.vocab_size = 5


@pytest.mark.parametrize("name", ["train-00000.bin", "valid-00000.bin", "tokenizer/tokenizer.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damage_is_noticed_and_named(prepared, name, damage):
    path = prepared.path / name
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        message = "changed since it was prepared"
    elif damage == "truncate":
        path.write_bytes(content[:-2])
        message = f"has {len(content) - 2} bytes, but the manifest says {len(content)}"
    else:
        path.unlink()
        message = "missing, though the manifest names it"
    with pytest.raises(UserError, match=f"{path}: {message}"):
        PreparedData.open(prepared.path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 99}, "format_version is 99; this version of avatarl reads 1"),
        ({"dtype": "float32"}, "dtype is 'float32'; accepted are uint16, uint32"),
        ({"dtype": "uint32"}, "tokens in its files, but the manifest says"),
        ({"files": {"../secret": {"bytes": 0, "sha256": ""}}}, "names '../secret', a file outside of its folder"),
        ({"tokens": None}, "tokens missing; prepare the data anew"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(prepared, change, message):
    manifest = {key: value for key, value in (prepared.manifest | change).items() if value is not None}
    (prepared.path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=message):
        PreparedData.open(prepared.path)


def test_a_folder_that_was_never_prepared_is_refused(tmp_path):
    with pytest.raises(UserError, match="manifest.json: no such file; a folder made by `avatarl prepare`"):
        PreparedData.open(tmp_path)
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(UserError, match="not the manifest of a prepared folder"):
        PreparedData.open(tmp_path)
