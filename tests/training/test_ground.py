"""Data, caches and critics that somebody writes into while a run trains."""

from __future__ import annotations

import os
import queue
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from avatarl.data import PreparedData, prepare
from avatarl.errors import RunFailed, UserError
from avatarl.files import File
from avatarl.models import CriticCache, cache_critic, load_model
from avatarl.models.critic_cache import answers, parts
from avatarl.run_dir.checkpoint import CHECKPOINTS
from avatarl.training import processes, train
from avatarl.training.optim import Optimisers
from avatarl.training.processes import Processes

from ..conftest import BLOCK, TINY_PLAYER, save_model, write_documents
from .runs import assert_same_weights, lines_of, weights_of


@pytest.fixture
def ground(tmp_path: Path, data_folder: Path, critic_folder: Path, critic_cache: Path) -> dict[str, str]:
    """Data, a critic and a cache of it of one's own to write into; ``data`` and ``critic`` of a configuration."""
    for name, folder in {"data": data_folder, "critic": critic_folder, "cache": critic_cache}.items():
        shutil.copytree(folder, tmp_path / name)
    return {name: str(tmp_path / name) for name in ("data", "critic", "cache")}


@pytest.fixture
def after_step(monkeypatch) -> Callable[[int, Callable[[], None]], None]:
    """``after_step(n, act)``: act after the n-th optimiser step from now on."""

    def arm(number: int, act: Callable[[], None]) -> None:
        real, taken = Optimisers.step, 0

        def step(self: Optimisers, *arguments) -> float:
            nonlocal taken
            taken += 1
            rate = real(self, *arguments)
            if taken == number:
                act()
            return rate

        monkeypatch.setattr(Optimisers, "step", step)

    return arm


def overwrite(path: Path) -> None:
    """With other bytes of the same number, as ``cp`` does."""
    content = path.read_bytes()
    with path.open("r+b") as file:
        file.write(bytes(byte ^ 1 for byte in content))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("change", [overwrite, cut])
def test_a_critic_is_copied_at_the_start(tiny_config, tmp_path: Path, ground, after_step, change):
    train(tiny_config(tmp_path / "undisturbed", critic=ground["critic"]), quiet=True)
    after_step(2, lambda: change(Path(ground["critic"]) / "model.safetensors"))
    train(tiny_config(tmp_path, critic=ground["critic"]), quiet=True)
    assert_same_weights(*(weights_of(folder / "run" / "final") for folder in (tmp_path, tmp_path / "undisturbed")))


def test_no_model_stays_mapped_to_its_file(critic_folder: Path):
    model = load_model(critic_folder)
    assert str(critic_folder) not in Path("/proc/self/maps").read_text()
    assert model.get_input_embeddings().weight.isfinite().all()


@pytest.mark.parametrize("change", [overwrite, cut])
@pytest.mark.parametrize(
    "name", ["data/train-00000.bin", "data/valid-00000.bin", "cache/train-00000.bin", "cache/valid-00000.bin"]
)
def test_data_and_caches_that_change_end_the_run_in_a_line(
    tiny_config, tmp_path: Path, ground, after_step, name: str, change
):
    """Before the next checkpoint, whether they would have been read or not; what resumes is the run of before."""
    config = dict(data=ground["data"], critic=ground["cache"], checkpoint_every_steps=3, log_every_steps=1)
    train(tiny_config(tmp_path / "undisturbed", **config), quiet=True)
    shutil.copy2(tmp_path / name, tmp_path / "kept")
    after_step(6, lambda: change(tmp_path / name))
    with pytest.raises(RunFailed, match=f"^{tmp_path / name} has changed while it was in use; put it back as it was"):
        train(tiny_config(tmp_path, **config), quiet=True)
    assert [path.name for path in (tmp_path / "run" / CHECKPOINTS).iterdir()] == ["step-00000003"]
    assert not (tmp_path / "run" / "final").exists()
    with pytest.raises(UserError, match=f"{tmp_path / name}: "):
        train(tiny_config(tmp_path, **config), resume=True, quiet=True)
    shutil.copy2(tmp_path / "kept", tmp_path / name)
    train(tiny_config(tmp_path, **config), resume=True, quiet=True)
    assert lines_of(tmp_path / "run") == lines_of(tmp_path / "undisturbed" / "run")
    assert_same_weights(*(weights_of(folder / "run" / "final") for folder in (tmp_path, tmp_path / "undisturbed")))


@pytest.mark.parametrize("change", [overwrite, cut])
@pytest.mark.parametrize("name", ["data/train-00000.bin", "cache/train-00000.bin"])
def test_no_step_is_taken_on_other_data(tiny_config, tmp_path: Path, ground, after_step, name: str, change):
    config = dict(data=ground["data"], critic=ground["cache"], log_every_steps=1, micro_batch_size=200)
    after_step(3, lambda: change(tmp_path / name))
    with pytest.raises(RunFailed, match=f"^{tmp_path / name} has changed while it was in use; put it back as it was"):
        train(tiny_config(tmp_path, **config, checkpoint_every_steps=100), quiet=True)
    assert [line["step"] for line in lines_of(tmp_path / "run")] == [1, 2, 3]


def test_data_that_is_removed_is_read_on(tiny_config, tmp_path: Path, ground, after_step):
    config = dict(data=ground["data"], critic=ground["cache"])
    train(tiny_config(tmp_path / "undisturbed", **config), quiet=True)
    after_step(2, lambda: [shutil.rmtree(ground[name]) for name in ("data", "cache")])
    train(tiny_config(tmp_path, **config), quiet=True)
    assert_same_weights(*(weights_of(folder / "run" / "final") for folder in (tmp_path, tmp_path / "undisturbed")))


def test_a_cache_is_of_the_data_that_was_opened(tmp_path: Path, ground, monkeypatch):
    real = answers.draw_uniforms

    def change_and_draw(seed, split, chosen, block_size):
        if split == "valid":
            overwrite(Path(ground["data"]) / "valid-00000.bin")
        return real(seed, split, chosen, block_size)

    monkeypatch.setattr(answers, "draw_uniforms", change_and_draw)
    settings = dict(block_size=BLOCK, kind="sample", precision="fp32", quiet=True, micro_batch_size=8)
    with pytest.raises(RunFailed, match="valid-00000.bin has changed while it was in use"):
        cache_critic(ground["critic"], ground["data"], tmp_path / "made", **settings)
    assert not (tmp_path / "made" / "cache.json").exists()
    assert not (tmp_path / "made" / "valid-00000.bin").exists()


# --- read once --------------------------------------------------------------------------------------------------------


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """The names of files that are read from end to end."""
    names, real = [], File.look_through

    def look_through(self: File, *arguments, **options) -> list:
        names.append(self.path.name)
        return real(self, *arguments, **options)

    monkeypatch.setattr(File, "look_through", look_through)
    return names


def written_long_ago(*folders: str | Path) -> None:
    for path in (path for folder in folders for path in Path(folder).rglob("*") if path.is_file()):
        os.utime(path, (1e9, 1e9))


def test_the_second_start_reads_nothing_again(tiny_config, tmp_path: Path, ground, read):
    written_long_ago(*ground.values())
    config = dict(data=ground["data"], critic=ground["cache"], steps=1)
    train(tiny_config(tmp_path / "first", **config), quiet=True)
    assert {"train-00000.bin", "valid-00000.bin", "tokenizer.json", "log_frequencies.bin"} <= set(read)
    read.clear()
    train(tiny_config(tmp_path / "second", **config), quiet=True)
    assert read == []
    (Path(ground["cache"]) / "train-00000.bin").touch()
    train(tiny_config(tmp_path / "third", **config), quiet=True)
    assert read == ["train-00000.bin"]


def test_one_process_reads_for_all(ground, read, monkeypatch):
    """Others look at sizes alone, unless theirs is another folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
    data = PreparedData.open(ground["data"])
    cache = CriticCache.open(ground["cache"], data, BLOCK)
    read.clear()
    PreparedData.open(ground["data"], verified=data.digest)
    CriticCache.open(ground["cache"], data, BLOCK, verified=cache.digest)
    assert read == []
    PreparedData.open(ground["data"], verified=cache.digest)
    assert "train-00000.bin" in read
    cut(Path(ground["data"]) / "train-00000.bin")
    with pytest.raises(UserError, match="train-00000.bin: has .* bytes"):
        PreparedData.open(ground["data"], verified=data.digest)


def test_the_main_process_is_not_taken_for_lost_while_it_reads(monkeypatch):
    """The others hear of it all the time; nobody waits for an answer as long as Gloo would."""
    monkeypatch.setattr(processes, "HEARTBEAT_SECONDS", 0.01)
    said: queue.Queue = queue.Queue()

    def broadcast(self: Processes, value: object) -> object:
        if not self.is_main:
            return heard.append(said.get(timeout=5)) or heard[-1]
        said.put(value)
        return value

    heard: list[object] = []
    monkeypatch.setattr(Processes, "broadcast", broadcast)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(Processes(1, 2).on_main, None)
        assert Processes(0, 2).on_main(lambda: time.sleep(0.2) or "found") == "found"
        assert other.result() == "found"
    assert len(heard) > 2 and set(heard[:-1]) == {None}


# --- many files -------------------------------------------------------------------------------------------------------

TRAIN = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
from avatarl.cli import main
from avatarl.models.critic_cache import parts
parts.SMALLEST_PART_BYTES = 1
sys.exit(main(["train", "--config", sys.argv[1]]))
"""


def test_more_files_than_a_process_may_open(tiny_config, tmp_path: Path, monkeypatch):
    source = write_documents(tmp_path / "documents.jsonl", count=60, seed=1)
    prepare([str(source)], tmp_path / "data", tokenizer="bpe:300", valid_fraction=0.1, shard_tokens=80, quiet=True)
    save_model(tmp_path / "critic", PreparedData.open(tmp_path / "data").load_tokenizer(), seed=77, factor=20)
    monkeypatch.setattr(parts, "SMALLEST_PART_BYTES", 1)
    cache_critic(str(tmp_path / "critic"), tmp_path / "data", tmp_path / "cache", block_size=BLOCK, quiet=True)
    for folder in ("data", "cache"):
        assert len(list((tmp_path / folder).glob("*.bin"))) > 90
    config = tiny_config(tmp_path, data=str(tmp_path / "data"), critic=str(tmp_path / "cache"), player=TINY_PLAYER)
    (tmp_path / "recipe.yaml").write_text(config.as_yaml())
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, str(tmp_path / "recipe.yaml")], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
