"""The main job: from text to a player trained by rewards, beside its cross-entropy twin.

Critic, player and twin read the same prepared text; player and twin also share size, initial weights, data order and
number of steps, and are evaluated on the same windows. Everything lies under one folder:

    data/  critic/  avatarl/  cross_entropy/  results.json  results.md  curves.png  samples.md
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
from rich.table import Table
from rich.text import Text

from .console import Console
from .data import PreparedData, prepare
from .data.dataset import MANIFEST, read_manifest
from .data.unfinished import remove_left
from .durable import refuse_link, replace_file
from .errors import RunStopped, UserError
from .lock import LOCK, RunLock
from .models import PlayerConfig
from .objective.config import require_whole
from .results import draw_curves, evaluate, generate
from .results.prompts import held_out_prompts
from .sanitise import backticks_around, markdown_code, one_line, visible
from .training import OptimConfig, TrainConfig, train
from .training.resume import check_run_folder
from .untrusted import check_place, refusing

RUNS, PAGES = {"critic", "avatarl", "cross_entropy"}, {"results.md", "curves.png", "samples.md"}
PLAYER = TrainConfig(
    data="runs/demo/data",
    out="runs/demo/avatarl",
    objective="avatarl",
    critic="runs/demo/critic",
    player=PlayerConfig(preset="1m"),
    optim=OptimConfig(name="muon", learning_rate=1e-2, warmup_steps=20, final_lr_fraction=0.05),
    block_size=256,
    micro_batch_size=8,
    steps=256,
    eval_every_steps=32,
    eval_windows=16,
    log_every_steps=4,
    checkpoint_every_steps=128,
)
# Two layers, and half the player's tokens: a critic that one can afford.
CRITIC_LAYERS, CRITIC_STEPS = 2, 128
# A short text is not read more often than this; beyond it both players only get worse.
MOST_EPOCHS = 8
SAMPLE_TOKENS = 120


def demo(source: str = "python-docs", out: str | Path = "runs/demo", seed: int = 1, quiet: bool = False) -> dict:
    """Train a critic, an AvataRL player and its cross-entropy twin, and compare them.

    The same call goes on where one was stopped.

    Args:
        source: ``python-docs`` or any source of :func:`avatarl.data.prepare`.
        out: The folder to make.
        seed: Decides initial weights and data order.
        quiet: Print nothing.

    Returns:
        What results.json holds: the data, the evaluation and training summary of each run, the differences.

    Raises:
        UserError: The source cannot be used or is too short, or ``out`` holds something else, or a finished demo.
        RunStopped: SIGTERM or SIGINT while a run trains; the same call goes on.
    """
    out = Path(out)
    require_whole("seed", seed, minimum=0)
    check_demo_folder(out, source)
    missing = [folder for folder in (out, *out.parents) if not os.path.exists(folder)]  # innermost first
    try:
        with refusing(f"out is {out}, which cannot be made (", ")"):
            out.mkdir(parents=True, exist_ok=True)
        with RunLock(out):
            return _run_demo(source, out, seed, quiet)
    except RunStopped as stop:
        raise RunStopped(stop.signum, f"{out} stopped; the same command goes on") from stop
    except BaseException:
        for folder in missing:  # a source that cannot be used leaves nothing behind
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def check_demo_folder(out: Path, source: str) -> None:
    """Refuse a folder that holds anything but what a demo of the same source left when it was stopped.

    Raises:
        UserError: naming it.
    """
    check_place(out)
    if not os.path.exists(out):
        return
    names = {name for name in os.listdir(out) if not _is_left_over(name)} if os.path.isdir(out) else None
    used = f"out is {out}, which already holds files; give another folder with --out"
    for name in PAGES:
        refuse_link(out / name)
    if names is not None and "results.json" in names:
        raise UserError(f"{used} (it holds results.json of a finished demo: see results.md and samples.md there)")
    is_begun = names is not None and names <= {*RUNS, *PAGES, "data"} and (not names & PAGES or RUNS <= names)
    if not is_begun or names and not (out / "data" / MANIFEST).is_file():
        raise UserError(used)
    if names and (sources := read_manifest(out / "data")[1].get("sources")) != [source]:
        raise UserError(f"{used} (it holds an unfinished demo of {sources}, and {source!r} is asked for)")


def _is_left_over(name: str) -> bool:
    """Whether a process that is gone has left what has this name, or it is a lock."""
    return name == LOCK or name.startswith((".data.unfinished-", ".results."))


def _run_demo(source: str, out: Path, seed: int, quiet: bool) -> dict:
    """What is still to be done of it, in a folder that no other process writes."""
    console, started = Console(quiet=quiet), time.monotonic()
    remove_left(out / "data")
    is_new = not (out / "data").exists()
    try:
        if is_new:
            prepare([source], out / "data", quiet=quiet)
        data = PreparedData.open(out / "data")
        configs = demo_configs(out, data, seed)
    except UserError:
        if is_new:
            shutil.rmtree(out / "data", ignore_errors=True)
        raise
    for config in configs.values():
        if changes := check_run_folder(Path(config.out), config, resume=True, allow_changes=True):
            raise UserError(
                f"{config.out} was started under other settings: {'; '.join(changes)}; give another folder with --out"
            )

    runs = {}
    for name, config in configs.items():
        console.rule(f"{name}: {config.objective}")
        summary = train(config, resume=True, quiet=quiet)
        critic = configs["critic"].out if name != "critic" else None
        scores = evaluate(config.out, config.data, critic=critic, avatarl=config.avatarl)
        runs[name] = {"evaluation": scores, "training": summary}

    results = {
        "source": source,
        "seed": seed,
        "tokens": data.manifest["tokens"],
        "vocab_size": data.vocab_size,
        "unigram_entropy": unigram_entropy(data),
        "runs": runs,
        "avatarl_minus_cross_entropy": {
            metric: runs["avatarl"]["evaluation"][metric] - runs["cross_entropy"]["evaluation"][metric]
            for metric in ("cross_entropy", "bits_per_byte", "top1_accuracy", "expected_calibration_error")
        },
    }
    write_samples(out / "samples.md", data, {name: configs[name].out for name in ("avatarl", "cross_entropy")})
    draw_curves(
        {name: config.out for name, config in configs.items()},
        out / "curves.png",
        {"unigram entropy": results["unigram_entropy"]},
    )
    results["seconds"] = time.monotonic() - started
    replace_file(out / "results.md", results_table(results))
    replace_file(out / "results.json", json.dumps(results, indent=1))  # last: it says that all is there
    print_results(console, results, out)
    return results


def demo_configs(out: Path, data: PreparedData, seed: int) -> dict[str, TrainConfig]:
    """The three runs; player and twin differ in their objective alone.

    Raises:
        UserError: The text is too short for one window of training or validation.
    """
    shortest = min(len(data.train), len(data.valid))
    if shortest <= PLAYER.block_size:
        raise UserError(
            f"the text gives {len(data.train):,} training and {len(data.valid):,} validation tokens; "
            f"expected more than {PLAYER.block_size} of each"
        )
    epoch_steps = max(1, (len(data.train) - 1) // PLAYER.block_size // PLAYER.windows_per_step)
    steps = min(PLAYER.steps, MOST_EPOCHS * epoch_steps)
    player = dataclasses.replace(
        PLAYER, data=str(out / "data"), out=str(out / "avatarl"), critic=str(out / "critic"), steps=steps, seed=seed
    )
    twin = dataclasses.replace(player, out=str(out / "cross_entropy"), objective="cross_entropy", critic=None)
    critic = dataclasses.replace(
        twin,
        out=str(out / "critic"),
        player=PlayerConfig(preset=PLAYER.player.preset, settings={"num_hidden_layers": CRITIC_LAYERS}),
        steps=min(CRITIC_STEPS, steps),
        seed=seed + 1,  # neither the player's weights nor its order of the data
    )
    return {"critic": critic, "avatarl": player, "cross_entropy": twin}


def unigram_entropy(data: PreparedData) -> float:
    """Entropy (nats) of the training tokens drawn without context: what knowing word frequencies alone achieves."""
    counts = np.bincount(data.train.slice(0, len(data.train)), minlength=data.vocab_size)
    probs = counts[counts > 0] / counts.sum()
    return float(-(probs * np.log(probs)).sum())


def write_samples(path: Path, data: PreparedData, runs: dict[str, str]) -> None:
    """Continuations of the same prompts by each run: the beginning of a document, and beginnings of held-out ones."""
    parts = ["# Samples", "", "Temperature 0.8, the same seed for every model; prompts are from held-out text."]
    for prompt in held_out_prompts(data):
        parts += ["", f"## {markdown_code(repr(prompt)) if prompt else 'beginning of a document'}"]
        for name, run in runs.items():
            (text,) = generate(run, prompt, max_new_tokens=SAMPLE_TOKENS)
            fence = backticks_around(text, fewest=3)
            parts += ["", f"**{name}**", "", f"{fence}text", visible(text), fence]
    path.write_text("\n".join(parts) + "\n", encoding="utf-8")


COLUMNS = {
    "nats": lambda run: f"{run['evaluation']['cross_entropy']:.3f}",
    "bits/byte": lambda run: f"{run['evaluation']['bits_per_byte']:.3f}",
    "top-1": lambda run: f"{run['evaluation']['top1_accuracy']:.1%}",
    "top-16": lambda run: f"{run['evaluation']['top16_accuracy']:.1%}",
    "ECE": lambda run: f"{run['evaluation']['expected_calibration_error']:.1%}",
    "entropy": lambda run: f"{run['evaluation']['entropy']:.2f}",
    "tokens": lambda run: f"{run['training']['tokens']:,}",
    "s": lambda run: f"{run['training']['seconds']:.0f}",
}


EXPLANATION = (
    "nats: cross-entropy per token; ECE: expected calibration error; entropy: of the predictions, nats; "
    "tokens and s: read and taken in training."
)


def results_table(results: dict) -> str:
    """The results as a Markdown table."""
    header = ["run", *COLUMNS]
    rows = [[name, *(column(run) for column in COLUMNS.values())] for name, run in results["runs"].items()]
    lines = ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]
    note = (
        f"Held-out text of {markdown_code(results['source'])}, "
        f"{results['runs']['avatarl']['evaluation']['tokens']:,} tokens, one seed. {EXPLANATION} "
        f"Unigram entropy of the training text: {results['unigram_entropy']:.3f} nats."
    )
    return "\n".join([*lines, "", note, ""])


def print_results(console: Console, results: dict, out: Path) -> None:
    """The results on the terminal, and where to look."""
    title = Text(one_line(f"held-out text of {results['source']}"))  # a path may look like markup
    table = Table(box=None, padding=(0, 2, 0, 0), title=title)
    for number, heading in enumerate(["run", *COLUMNS]):
        table.add_column(heading, justify="left" if number == 0 else "right")
    for name, run in results["runs"].items():
        table.add_row(name, *(column(run) for column in COLUMNS.values()))
    console.print(table)
    shown = one_line(str(out))
    paid_elsewhere = results["runs"]["avatarl"]["evaluation"]["rewards"]["other_reward_share"]
    console.print(
        f"{EXPLANATION}\n"
        f"Unigram entropy of the training text: {results['unigram_entropy']:.3f} nats. "
        f"Reward paid to tokens other than the text's: {paid_elsewhere:.1%}.\n"
        f"One seed, {results['seconds'] / 60:.1f} minutes. "
        f"Look at {shown}/samples.md, curves.png, results.json, and at:\n"
        f"avatarl report {shown}/avatarl {shown}/cross_entropy --out report.html\n"
        f"avatarl inspect --player {shown}/avatarl --text 'Return the sum of the numbers.'\n"
        f"avatarl generate {shown}/avatarl --prompt 'Return the'",
        soft_wrap=True,  # commands that are copied
        highlight=False,
        markup=False,
    )
