"""The whole job in one command: from text to a player trained by rewards, beside its cross-entropy twin.

Critic, player and twin read the same prepared text. Player and twin also share size, initial weights, data order and
number of steps, and are evaluated on the same windows. Everything lies in one folder:

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
from rich.markdown import Markdown

from . import data, results, training
from .console import Console
from .data.dataset import MANIFEST, PreparedData, read_manifest
from .data.unfinished import remove_left
from .durable import refuse_link, replace_file
from .errors import RunStopped, UserError
from .models.config import PlayerConfig
from .objective.config import require_whole
from .results.prompts import held_out_prompts
from .sanitise import backticks_around, markdown_code, one_line, visible
from .training.config import OptimConfig, TrainConfig
from .untrusted import check_place

RUNS, PAGES = ("critic", "avatarl", "cross_entropy"), ("results.md", "curves.png", "samples.md")
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
# A cheap critic: two layers, trained on half of the player's tokens.
CRITIC_LAYERS, CRITIC_STEPS = 2, 128
# Passes over a short text; beyond these both players only get worse.
MOST_EPOCHS = 8
SAMPLE_TOKENS = 120


def demo(source: str = "python-docs", out: str | Path = "runs/demo", seed: int = 1, quiet: bool = False) -> dict:
    """Train a critic, an AvataRL player and its cross-entropy twin, and compare them.

    The same call resumes a demo that was stopped.

    Args:
        source: The text to learn: ``python-docs``, or a file, folder or data set as in ``avatarl prepare``.
        out: The folder to make.
        seed: Decides initial weights and data order.
        quiet: Print nothing.

    Returns:
        The content of results.json: the data, the evaluation and training summary of each run, the differences.

    Raises:
        UserError: The source cannot be used or is too short, or ``out`` holds something else, or a finished demo.
        RunStopped: SIGTERM or SIGINT while a run trains; the same call resumes.
    """
    out, console, started = Path(out), Console(quiet=quiet), time.monotonic()
    require_whole("seed", seed, minimum=0)
    check_demo_folder(out, source)
    try:
        prepared, configs = _prepare(source, out, seed, quiet)
        runs = {}
        for name, config in configs.items():
            console.rule(f"{name}: {config.objective}")
            summary = training.train(config, resume=True, quiet=quiet)
            critic = configs["critic"].out if name != "critic" else None
            scores = results.evaluate(config.out, config.data, critic=critic, avatarl=config.avatarl)
            runs[name] = {"evaluation": scores, "training": summary}
    except RunStopped as stop:
        raise RunStopped(stop.signum, f"{out} stopped; run the same command to resume it") from stop

    player, twin = (runs[name]["evaluation"] for name in ("avatarl", "cross_entropy"))
    metrics = ("cross_entropy", "bits_per_byte", "top1_accuracy", "expected_calibration_error")
    found = {
        "source": source,
        "seed": seed,
        "tokens": prepared.manifest["tokens"],
        "vocab_size": prepared.vocab_size,
        "unigram_entropy": unigram_entropy(prepared),
        "runs": runs,
        "avatarl_minus_cross_entropy": {metric: player[metric] - twin[metric] for metric in metrics},
    }
    write_samples(out / "samples.md", prepared, {name: configs[name].out for name in ("avatarl", "cross_entropy")})
    results.draw_curves(
        {name: config.out for name, config in configs.items()},
        out / "curves.png",
        {"unigram entropy": found["unigram_entropy"]},
    )
    found["seconds"] = time.monotonic() - started
    replace_file(out / "results.md", results_table(found))
    replace_file(out / "results.json", json.dumps(found, indent=1))  # last: its presence means a finished demo
    print_results(console, found, out)
    return found


def check_demo_folder(out: Path, source: str) -> None:
    """Refuse a folder that holds anything but an unfinished demo of the same source.

    Raises:
        UserError: naming it.
    """
    check_place(out)
    if not os.path.exists(out):
        return
    names = {name for name in os.listdir(out) if not name.startswith(".")} if os.path.isdir(out) else {""}
    used = f"out is {out}, which already holds files; give another folder with --out"
    for name in PAGES:
        refuse_link(out / name)
    if "results.json" in names:
        raise UserError(f"{used} (it holds results.json of a finished demo: see results.md and samples.md there)")
    is_demo = names <= {"data", *RUNS, *PAGES} and (not names & {*PAGES} or names >= {*RUNS})
    if names and not (is_demo and (out / "data" / MANIFEST).is_file()):
        raise UserError(used)
    if names and (sources := read_manifest(out / "data")[1].get("sources")) != [source]:
        raise UserError(f"{used} (it holds an unfinished demo of {sources}, and the source now is {source!r})")


def _prepare(source: str, out: Path, seed: int, quiet: bool) -> tuple[PreparedData, dict[str, TrainConfig]]:
    """Prepare the text unless that is done; a text that cannot be used leaves nothing behind."""
    from .training.resume import check_run_folder

    missing = [folder for folder in (out, *out.parents) if not os.path.exists(folder)]  # innermost first
    remove_left(out / "data")
    is_new = not (out / "data").exists()
    try:
        if is_new:
            data.prepare([source], out / "data", quiet=quiet)
        prepared = PreparedData.open(out / "data")
        configs = demo_configs(out, prepared, seed)
    except UserError:
        if is_new:
            shutil.rmtree(out / "data", ignore_errors=True)
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
    for config in configs.values():
        if changes := check_run_folder(Path(config.out), config, resume=True, allow_changes=True):
            raise UserError(
                f"{config.out} was started under other settings: {'; '.join(changes)}; give another folder with --out"
            )
    return prepared, configs


def demo_configs(out: Path, prepared: PreparedData, seed: int) -> dict[str, TrainConfig]:
    """Return the settings of the three runs; player and twin differ only in their objective.

    Raises:
        UserError: The text is too short for one window of training or validation.
    """
    shortest = min(len(prepared.train), len(prepared.valid))
    if shortest <= PLAYER.block_size:
        raise UserError(
            f"the text gives {len(prepared.train):,} training and {len(prepared.valid):,} validation tokens; "
            f"expected more than {PLAYER.block_size} of each"
        )
    epoch_steps = max(1, (len(prepared.train) - 1) // PLAYER.block_size // PLAYER.windows_per_step)
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
        seed=seed + 1,  # other initial weights and another data order than the player's
    )
    return {"critic": critic, "avatarl": player, "cross_entropy": twin}


def unigram_entropy(prepared: PreparedData) -> float:
    """Entropy (nats) of the training tokens' frequencies: the loss of a model that ignores the context."""
    counts = np.bincount(prepared.train.slice(0, len(prepared.train)), minlength=prepared.vocab_size)
    probs = counts[counts > 0] / counts.sum()
    return float(-(probs * np.log(probs)).sum())


def write_samples(path: Path, prepared: PreparedData, runs: dict[str, str]) -> None:
    """Write how each run continues the same prompts: the beginning of a document, and beginnings of held-out ones."""
    parts = ["# Samples", "", "Temperature 0.8, the same seed for every model; prompts are from held-out text."]
    for prompt in held_out_prompts(prepared):
        parts += ["", f"## {markdown_code(repr(prompt)) if prompt else 'beginning of a document'}"]
        for name, run in runs.items():
            (text,) = results.generate(run, prompt, max_new_tokens=SAMPLE_TOKENS)
            fence = backticks_around(text, fewest=3)
            parts += ["", f"**{name}**", "", f"{fence}text", visible(text), fence]
    replace_file(path, "\n".join(parts) + "\n")


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
    "nats: cross-entropy per token; ECE: expected calibration error; entropy: of the predictions, in nats; "
    "tokens and s: training tokens and seconds."
)


def results_table(found: dict) -> str:
    """Return the results as a Markdown table."""
    header = ["run", *COLUMNS]
    rows = [[name, *(column(run) for column in COLUMNS.values())] for name, run in found["runs"].items()]
    lines = ["| " + " | ".join(row) + " |" for row in (header, ["---"] + ["---:"] * len(COLUMNS), *rows)]
    note = (
        f"Held-out text of {markdown_code(found['source'])}, "
        f"{found['runs']['avatarl']['evaluation']['tokens']:,} tokens, one seed. {EXPLANATION} "
        f"Unigram entropy of the training text: {found['unigram_entropy']:.3f} nats."
    )
    return "\n".join([*lines, "", note, ""])


def print_results(console: Console, found: dict, out: Path) -> None:
    """Print the results and the commands to look closer."""
    console.print(Markdown(results_table(found)))
    rewards, shown = found["runs"]["avatarl"]["evaluation"]["rewards"], one_line(str(out))
    console.print(
        f"{rewards['other_reward_share']:.1%} of the reward went to tokens other than the text's. "
        f"The demo took {found['seconds'] / 60:.1f} minutes.\n"
        f"Look at {shown}/samples.md, curves.png, results.json, and at:\n"
        f"avatarl report {shown}/avatarl {shown}/cross_entropy --out report.html\n"
        f"avatarl inspect --player {shown}/avatarl --text 'Return the sum of the numbers.'\n"
        f"avatarl generate {shown}/avatarl --prompt 'Return the'",
        soft_wrap=True,  # so that the commands can be copied
        highlight=False,
        markup=False,
    )
