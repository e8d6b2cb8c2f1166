"""The command line: a thin shell over functions that are also public.

A user's mistake ends in one line and exit status 2, a failure of the run in 1, an interrupt in 130; ``--debug`` shows
the traceback. Every import of weight waits until its command is known, so that ``avatarl --help`` answers at once.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import select
import sys
from argparse import ArgumentError
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import RunFailed, RunStopped, UserError, nearest_name
from .options import add_recipe, make_parser, one_line_of, option_in, parse
from .process import end_with_parent, set_up_process
from .sanitise import one_line, sanitised_output
from .version import __version__

USER_MISTAKE, RUN_FAILURE, INTERRUPTED = 2, 1, 130
OUTPUTS = (1, 2)  # the descriptors of stdout and stderr
NOBODY_READS = 128 + 13  # as the shell has it of what SIGPIPE ends


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what the terminal cannot show is escaped
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            return _run(arguments)
        finally:
            print(end="", flush=True)
    except BrokenPipeError:  # as `avatarl … | head -1` leaves it; what is still to be written goes nowhere
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in OUTPUTS:
            os.dup2(nowhere, descriptor)
        return NOBODY_READS


@sanitised_output()
def _run(arguments: Sequence[str] | None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(_help())
        return 0
    if command == "--version":
        print(f"avatarl {__version__}")
        return 0
    try:
        if command not in COMMANDS:
            raise UserError(
                f"command is {command!r}; expected one of {', '.join(COMMANDS)}{nearest_name(command, COMMANDS)}"
            )
        end_with_parent()
        set_up_process()
        _quiet_libraries()
        COMMANDS[command](arguments[1:])
        return 0
    except RunStopped as stop:
        return _end(one_line_of(stop), 128 + stop.signum, debug)
    except KeyboardInterrupt:
        return _end("interrupted", INTERRUPTED, debug)
    except (UserError, ArgumentError) as error:
        return _end(one_line_of(error), USER_MISTAKE, debug)
    except RunFailed as error:
        return _end(one_line_of(error), RUN_FAILURE, debug)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _is_unread():
            raise
        return _end(f"{type(error).__name__}: {one_line_of(error)}", RUN_FAILURE, debug)


def demo_command(arguments: Sequence[str]) -> None:
    """train critic, AvataRL player and cross-entropy twin on python-docs or your own text"""
    from .demo import demo

    parser = _parser("demo")
    parser.add_argument("source", nargs="?", default="python-docs", help="text to learn, as for prepare")
    parser.add_argument("--out", default="runs/demo", help="folder to make")
    parser.add_argument("--seed", type=int, default=1, help="decides initial weights and data order")
    demo(**parse(parser, arguments))


def prepare_command(arguments: Sequence[str]) -> None:
    """turn text into a prepared data folder"""
    from .data import prepare

    parser = _parser("prepare")
    parser.add_argument(
        "sources",
        nargs="+",
        help="files or folders (.txt .md .jsonl .parquet, .gz of these), python-docs, hub:DATASET_ID, or a folder with "
        "nanoGPT's train.bin and val.bin",
    )
    parser.add_argument("--out", required=True, help="folder to make")
    parser.add_argument("--tokenizer", default="bpe:4096", help="bpe:SIZE to train one, gpt2, a folder or a hub id")
    parser.add_argument("--valid_fraction", type=float, default=0.05, help="share of the text held out")
    parser.add_argument("--text_field", default="text", help="the field of jsonl, parquet and hub: that holds the text")
    parser.add_argument("--processes", type=int, default=1, help="read so many files or shards at once")
    manifest = prepare(**parse(parser, arguments))
    tokens, documents = manifest["tokens"], manifest["documents"]
    print(
        f"{tokens['train']:,} training tokens in {documents['train']:,} documents, "
        f"{tokens['valid']:,} validation tokens in {documents['valid']:,}, vocabulary {manifest['vocab_size']:,}"
    )


def train_command(arguments: Sequence[str]) -> None:
    """train a player by a recipe"""
    from .objective import make_objective
    from .places import owner, require_found
    from .training import TrainConfig, train

    parser = _parser("train")
    add_recipe(parser)
    parser.add_argument("--resume", action="store_true", help="continue from the newest good checkpoint")
    parser.add_argument("--allow_changes", action="store_true", help="resume under other settings, data or critics")
    parser.add_class_arguments(TrainConfig)
    settings = parse(parser, arguments)
    recipes = settings.pop("config") or []
    resume, allow_changes = settings.pop("resume"), settings.pop("allow_changes")
    config = TrainConfig(**settings)
    asks = make_objective(config.objective, config.avatarl, config.baseline).needs_critic
    for recipe in filter(owner, map(str, recipes)):
        require_found(recipe, {"data": config.data, "critic": config.critics if asks else None})
    summary = train(config, resume=resume, allow_changes=allow_changes)
    if not _process():
        print(f"best validation cross-entropy {summary['best_cross_entropy']:.4f} nats at step {summary['best_step']}")


def critic_command(arguments: Sequence[str]) -> None:
    """cache a critic's answers, so that training needs no critic in memory"""
    from .models import cache_critic

    action = arguments[0] if arguments else "--help"
    if action not in ("cache", "-h", "--help"):
        raise UserError(f"critic is followed by {action!r}; expected cache{nearest_name(action, ['cache'])}")
    parser = _parser("critic", "cache")
    parser.add_argument("--critic", required=True, help="a run folder, a model folder or a hub id")
    parser.add_argument("--data", required=True, help="a prepared data folder; both splits are read")
    parser.add_argument("--out", required=True, help="folder to make; the same command goes on after an interruption")
    parser.add_argument("--block_size", type=int | None, help="tokens in a window (default: the context of the critic)")
    parser.add_argument("--kind", default="top", help="top, its most likely tokens, or sample, tokens drawn from it")
    parser.add_argument("--bytes_per_token", type=int, default=134, help="budget of a position (6 + 4 or 2 a token)")
    parser.add_argument("--keep_top", type=int, default=0, help="with sample: so many most likely tokens besides")
    parser.add_argument("--train_windows", type=int | None, help="as in the runs that will use it (default: all)")
    parser.add_argument("--seed", type=int, default=1, help="decides the drawn tokens")
    parser.add_argument("--micro_batch_size", type=int, default=16, help="windows in a forward pass")
    parser.add_argument("--precision", default="auto", help="bf16, fp32 or auto, as in the runs that will use it")
    parser.add_argument("--critic_quantization", type=dict[str, Any] | None, help="as a recipe has it")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    settings = parse(parser, list(arguments[1:]) if action == "cache" else ["--help"])
    manifest = cache_critic(**settings)
    if not _process():
        tokens = manifest["block_size"] * sum(manifest["windows"].values())
        state = "finished" if "files" in manifest else "this process's part of it is finished"
        print(
            f"{settings['out']}: {state}; {tokens:,} tokens at {manifest['bytes_per_token']} bytes: "
            f"{manifest['num_top']} most likely and {manifest['num_draws']} drawn tokens a position"
        )


def verify_command(arguments: Sequence[str]) -> None:
    """read prepared data and caches in full, though they seem untouched since they last were"""
    from .models import verify

    parser = _parser("verify")
    parser.add_argument("folders", nargs="+", help="prepared data folders and caches of critics")
    verify(**parse(parser, arguments))


def plan_command(arguments: Sequence[str]) -> None:
    """what a recipe takes on a device: FLOPs, memory, time and disk"""
    from .planning import UTILISATION, plan, plan_table
    from .training import TrainConfig

    parser = _parser("plan")
    add_recipe(parser)
    parser.add_argument("--processes", type=int, default=1, help="how many share the run, a device each")
    parser.add_argument("--utilisation", type=float, default=UTILISATION, help="share of the device's peak to suppose")
    parser.add_argument("--vocab_size", type=int, help="tokens of vocabulary, where the data is not there yet")
    parser.add_argument("--critic_preset", help="size of critics that are not there yet")
    parser.add_class_arguments(TrainConfig)
    settings = parse(parser, arguments)
    recipe = settings.pop("config")
    options = {name: settings.pop(name) for name in ("processes", "utilisation", "vocab_size", "critic_preset")}
    print(plan_table(plan(TrainConfig(**settings), recipe=str(recipe[0]) if recipe else None, **options)))


def evaluate_command(arguments: Sequence[str]) -> None:
    """held-out text, minimal pairs and tasks of the lm-evaluation-harness, as JSON"""
    from .objective import AvataRLConfig
    from .results import evaluate

    parser = _parser("evaluate")
    parser.add_argument("model", help="a run folder, a model folder or a hub id")
    parser.add_argument("--data", help="a prepared data folder: likelihood, accuracy and calibration on its text")
    parser.add_argument("--critic", nargs="+", help="critics: adds the reward metrics on data")
    parser.add_argument("--split", help="of data: valid (default) or train")
    parser.add_argument("--block_size", type=int, help="of data: tokens in a window (default: the model's context)")
    parser.add_argument("--max_windows", type=int, help="of data: look at the first so many windows only")
    parser.add_argument("--pairs", help="minimal pairs: a .jsonl file or a folder of them")
    parser.add_argument("--tasks", help="tasks of the lm-evaluation-harness: NAME,NAME")
    parser.add_argument("--include_path", help="of tasks: a folder with your own (YAML)")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    parser.add_class_arguments(AvataRLConfig, "avatarl")
    settings = {name: value for name, value in parse(parser, arguments).items() if value is not None}
    print(json.dumps(evaluate(**settings), indent=1))


def generate_command(arguments: Sequence[str]) -> None:
    """text from a model"""
    from .results import generate

    parser = _parser("generate")
    parser.add_argument("model", help="a run folder, a model folder or a hub id")
    parser.add_argument("--prompt", default="", help="text to continue")
    parser.add_argument("--samples", type=int, default=1, help="how many continuations")
    parser.add_argument("--max_new_tokens", type=int, default=100, help="their greatest length")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 always takes the most likely token")
    parser.add_argument("--top_k", type=int, help="draw from so many most likely tokens only")
    parser.add_argument("--top_p", type=float, help="draw from the shortest list that reaches this probability")
    parser.add_argument("--seed", type=int, default=1, help="the same seed gives the same texts")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    print("\n\n---\n\n".join(generate(**parse(parser, arguments))))


def inspect_command(arguments: Sequence[str]) -> None:
    """what each candidate of a text was paid: in the terminal, as a page, as JSON"""
    from .objective import AvataRLConfig
    from .results.inspect import inspect, trained_with

    parser = _parser("inspect")
    parser.add_argument("--player", required=True, help="a run folder, a model folder or a hub id")
    parser.add_argument("--critic", nargs="+", help="critics (default: those that the run was trained with)")
    parser.add_argument("--text", help="the text to look at")
    parser.add_argument("--file", help="a file with the text; - for standard input")
    parser.add_argument("--position", type=int, help="show the candidates of this token, counted from 0")
    parser.add_argument("--out", help="write a page (.html) or the numbers (.json) instead")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    parser.add_class_arguments(AvataRLConfig, "avatarl")
    parser.groups["avatarl"].title = "Settings of the rewards (default: those of the player's run, else the article's)"
    # Settings that are not given are those that the player was trained with.
    if player := option_in(arguments, "--player"):
        own, _ = trained_with(player)
        parser.set_defaults({f"avatarl.{name}": value for name, value in dataclasses.asdict(own).items()})
    inspect(**parse(parser, arguments))


def report_command(arguments: Sequence[str]) -> None:
    """runs side by side in one page: settings, results, curves, calibration, samples"""
    from .results.report import report

    parser = _parser("report")
    parser.add_argument("runs", nargs="+", help="run folders, finished or not")
    parser.add_argument("--out", required=True, help="the page to write: .html, or .md without curves")
    parser.add_argument(
        "--baseline", help="the run to compare with (default: the first trained by cross-entropy, critics aside)"
    )
    parser.add_argument("--data", help="prepared data to evaluate all runs on (default: each on its own)")
    parser.add_argument("--max_windows", type=int, default=64, help="validation windows to evaluate on")
    parser.add_argument("--prompt", nargs="+", help="texts to continue (default: beginnings of held-out documents)")
    parser.add_argument("--sample_tokens", type=int, default=80, help="length of a continuation")
    parser.add_argument("--evaluate", type=bool, default=True, help="false: only what the run folders hold")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    settings = parse(parser, arguments)
    report(prompts=settings.pop("prompt"), **settings)
    print(settings["out"])


def compare_command(arguments: Sequence[str]) -> None:
    """arms by seeds: train what is missing, then say how they differ, with intervals"""
    from .comparison import ComparisonConfig, compare
    from .places import owner, require_found

    parser = _parser("compare")
    add_recipe(parser)
    parser.add_class_arguments(ComparisonConfig)
    parser.add_argument("--device", default="auto", help="of the evaluation of finished players: cpu, cuda or auto")
    settings = parse(parser, arguments)
    recipes, device = settings.pop("config") or [], settings.pop("device")
    comparison = ComparisonConfig(**settings)
    for recipe in filter(owner, map(str, recipes)):
        require_found(recipe, settings)
    compare(comparison, device=device)
    print((Path(comparison.out) / "report.md").read_text(encoding="utf-8"))


def play_command(arguments: Sequence[str]) -> None:
    """a page on this machine: players continue a prompt, each token shows what it was paid"""
    from .results.play import play

    parser = _parser("play")
    parser.add_argument("runs", nargs="+", help="one or two run folders, model folders or hub ids")
    parser.add_argument("--critic", nargs="+", help="critics (default: those that the first run was trained with)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; there is no password")
    parser.add_argument("--port", type=int, default=7860, help="port there")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    play(**parse(parser, arguments))


def push_command(arguments: Sequence[str]) -> None:
    """send a finished player to the Hugging Face Hub"""
    from .results import push_to_hub

    parser = _parser("push")
    parser.add_argument("model", help="a run folder (its best player) or a model folder")
    parser.add_argument("--repo", required=True, help="OWNER/NAME on the Hub, made where there is none")
    parser.add_argument("--private", action="store_true", help="whether nobody else may see it")
    print(push_to_hub(**parse(parser, arguments)))


COMMANDS = {
    "demo": demo_command,
    "prepare": prepare_command,
    "train": train_command,
    "critic": critic_command,
    "verify": verify_command,
    "plan": plan_command,
    "evaluate": evaluate_command,
    "generate": generate_command,
    "inspect": inspect_command,
    "report": report_command,
    "compare": compare_command,
    "play": play_command,
    "push": push_command,
}


def _help() -> str:
    lines = [f"  {name:<10} {command.__doc__}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: avatarl COMMAND [options]",
            "",
            "Train small language models from scratch with rewards instead of labels.",
            "",
            *lines,
            "",
            "avatarl COMMAND --help shows a command's options; --debug shows tracebacks.",
        ]
    )


def _parser(command: str, action: str = ""):
    return make_parser(f"avatarl {command} {action}".rstrip(), COMMANDS[command].__doc__)


def _end(message: str, status: int, debug: bool) -> int:
    """Say why in one line; with ``--debug`` the traceback comes first."""
    if debug:
        import traceback

        traceback.print_exc()
    print(f"avatarl: {_process()}{one_line(message)}", file=sys.stderr)
    return status


def _is_unread() -> bool:
    """Whether stdout or stderr is a pipe that nobody reads any more."""
    poll = select.poll()
    for descriptor in OUTPUTS:
        poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _process() -> str:
    """Which of several processes this is; empty for the first, which speaks for all, and for one alone."""
    rank, count = os.environ.get("RANK") or "0", os.environ.get("WORLD_SIZE") or "1"
    return "" if rank == "0" or count == "1" else f"process {rank}: "


def _quiet_libraries() -> None:
    """Our progress is enough: no bars of the libraries below, no advice about the hub."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # it draws by returning to the line's beginning
    from logging import getLogger

    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    for quantiser in ("bitsandbytes", "torchao"):  # which warn of every layer in every step
        getLogger(quantiser).setLevel("ERROR")
