"""The command line: a table of commands, each a public function, and what surrounds a command.

A function's signature and docstring are its command's options and help. Functions import torch and transformers in
their bodies, so that ``--help`` and a mistake are answered at once. A user's mistake ends in one line and exit status
2, a failure of the run in 1, an interrupt in 130, a termination in 143; ``--debug`` shows the traceback.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import select
import sys
from argparse import ArgumentError
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from .errors import RunFailed, RunStopped, UserError, nearest_name
from .process import end_with_parent, set_up_process
from .sanitise import one_line, sanitised_output
from .version import __version__

USER_MISTAKE, RUN_FAILURE, INTERRUPTED = 2, 1, 130
OUTPUTS = (1, 2)  # file descriptors of stdout and stderr
BROKEN_PIPE = 128 + 13  # the status that a shell gives a process ended by SIGPIPE
NOT_OPTIONS = {"quiet", "recipe", "shard_tokens"}  # parameters that the command line does not offer


@dataclass(frozen=True)
class Command:
    """A command of the table.

    Args:
        summary: Its line in ``avatarl --help``.
        function: The public function, ``module:name`` below avatarl. Its module imports without torch.
        positional: The parameter that is given without its name.
        names: Options whose name differs from the parameter's.
        adapt: Changes the parser before it reads the command line.
        paths: The settings of a recipe that name files which have to be there.
        takes_recipe: Whether the function also takes the recipe's file.
        show: What to print of the result and the settings; None prints nothing.
    """

    summary: str
    function: str
    positional: str = ""
    names: Mapping[str, str] = field(default_factory=dict)
    adapt: Callable[[Any, Sequence[str]], None] | None = None
    paths: Callable[[Any], Mapping[str, Any]] | None = None
    takes_recipe: bool = False
    show: Callable[[Any, Mapping[str, Any]], str] | None = None

    def run(self, name: str, arguments: Sequence[str]) -> None:
        """Parse the command line, call the function and print what it found."""
        from .options import add_function, make_parser, parse

        module, function_name = self.function.split(":")
        function = getattr(import_module(f".{module}", __package__), function_name)
        parser = make_parser(f"avatarl {name}", self.summary)
        config = add_function(parser, function, self.positional, NOT_OPTIONS, self.names)
        if self.adapt:
            self.adapt(parser, arguments)
        settings = parse(parser, arguments)
        if config:
            settings = self._with_config(settings, *config)
        settings |= {parameter: settings.pop(option) for parameter, option in self.names.items()}
        _quiet_libraries()
        result = function(**settings)
        if self.show and not _process():
            print(self.show(result, settings))

    def _with_config(self, settings: dict, name: str, kind: type) -> dict:
        """Build the dataclass whose fields a recipe and options set; refuse a run's files that are gone."""
        from .places import owner, require_found

        recipes = settings.pop("config") or []
        config = kind(**{each.name: settings.pop(each.name) for each in dataclasses.fields(kind)})
        if self.paths:
            for recipe in filter(owner, map(str, recipes)):
                require_found(recipe, self.paths(config))
        if self.takes_recipe and recipes:
            settings["recipe"] = str(recipes[0])
        return {**settings, name: config}


def _prepared(manifest: dict, _) -> str:
    tokens, documents = manifest["tokens"], manifest["documents"]
    return (
        f"{tokens['train']:,} training tokens in {documents['train']:,} documents, "
        f"{tokens['valid']:,} validation tokens in {documents['valid']:,}, vocabulary {manifest['vocab_size']:,}"
    )


def _paths_of_run(config) -> dict[str, Any]:
    from .objective.config import OBJECTIVES

    needs_critic = OBJECTIVES[config.objective].needs_critic(config.avatarl, config.baseline)
    return {"data": config.data, "critic": config.critics if needs_critic else None}


def _cached(manifest: dict, settings: Mapping[str, Any]) -> str:
    tokens = manifest["block_size"] * sum(manifest["windows"].values())
    state = "finished" if "files" in manifest else "this process's part is finished"
    return (
        f"{settings['out']}: {state}; {tokens:,} tokens at {manifest['bytes_per_token']} bytes: "
        f"{manifest['num_top']} most likely and {manifest['num_draws']} drawn tokens a position"
    )


def _as_trained(parser, arguments: Sequence[str]) -> None:
    """Have the reward settings that are not given be those that the player was trained with."""
    from .results.inspect import trained_with

    parser.groups["avatarl"].title = "Settings of the rewards (default: those of the player's run, else the article's)"
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, equals, value = argument.partition("=")
        if name == "--player" and (player := value if equals else following):
            own, _ = trained_with(player)
            parser.set_defaults({f"avatarl.{each}": value for each, value in dataclasses.asdict(own).items()})


def _plan(plan: Any, _) -> str:
    from .planning import plan_table

    return plan_table(plan)


COMMANDS = {
    "demo": Command(
        "Train a critic, an AvataRL player and its cross-entropy twin on python-docs or your own text",
        "demo:demo",
        positional="source",
    ),
    "prepare": Command("Turn text into a prepared data folder", "data:prepare", positional="sources", show=_prepared),
    "train": Command(
        "Train a player from a recipe",
        "training:train",
        paths=_paths_of_run,
        show=lambda found, _: (
            f"best validation cross-entropy {found['best_cross_entropy']:.4f} nats at step {found['best_step']}"
        ),
    ),
    "critic cache": Command(
        "Store a critic's answers on disk, so that training need not run the critic",
        "models:cache_critic",
        show=_cached,
    ),
    "verify": Command(
        "Read prepared data and critic caches in full and compare them with their digests",
        "models:verify",
        positional="folders",
    ),
    "plan": Command(
        "Estimate a recipe's FLOPs, memory, time and disk on a device",
        "planning:plan",
        takes_recipe=True,
        show=_plan,
    ),
    "evaluate": Command(
        "Evaluate a model on held-out text, minimal pairs or lm-evaluation-harness tasks, and print JSON",
        "results:evaluate",
        positional="model",
        show=lambda found, _: json.dumps(found, indent=1),
    ),
    "generate": Command(
        "Continue a prompt",
        "results:generate",
        positional="model",
        show=lambda texts, _: "\n\n---\n\n".join(texts),
    ),
    "inspect": Command(
        "Show the reward of each candidate token of a text, in the terminal, as a page or as JSON",
        "results.inspect:inspect",
        adapt=_as_trained,
    ),
    "report": Command(
        "Compare runs on one page: settings, results, curves, calibration, samples",
        "results.report:report",
        positional="runs",
        names={"prompts": "prompt"},
        show=lambda _, settings: str(settings["out"]),
    ),
    "compare": Command(
        "Train what is missing of several arms and seeds, and say how they differ, with intervals",
        "comparison:compare",
        paths=vars,
        show=lambda _, settings: (Path(settings["comparison"].out) / "report.md").read_text(encoding="utf-8"),
    ),
    "play": Command(
        "Serve a page on this machine where players continue a prompt and each token shows its reward",
        "results.play:play",
        positional="runs",
    ),
    "push": Command(
        "Upload a finished player to the Hugging Face Hub",
        "results:push_to_hub",
        positional="model",
        show=lambda address, _: address,
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # escape what the terminal's encoding lacks
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            return _run(arguments)
        finally:
            print(end="", flush=True)
    except BrokenPipeError:  # as in `avatarl … | head -1`; discard what is still buffered
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in OUTPUTS:
            os.dup2(nowhere, descriptor)
        return BROKEN_PIPE


@sanitised_output()
def _run(arguments: Sequence[str] | None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0
    if arguments[0] == "--version":
        print(f"avatarl {__version__}")
        return 0
    try:
        name, arguments = _command_in(arguments)
        end_with_parent()
        set_up_process()
        COMMANDS[name].run(name, arguments)
        return 0
    except RunStopped as stop:
        return _end(stop, 128 + stop.signum, debug)
    except KeyboardInterrupt:
        return _end("interrupted", INTERRUPTED, debug)
    except (UserError, ArgumentError) as error:
        return _end(error, USER_MISTAKE, debug)
    except RunFailed as error:
        return _end(error, RUN_FAILURE, debug)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _is_unread():
            raise
        return _end(error, RUN_FAILURE, debug, f"{type(error).__name__}: ")


def _command_in(arguments: list[str]) -> tuple[str, list[str]]:
    """Split a command line into a command's name, of one word or two, and its arguments."""
    command, *rest = arguments
    for name in (command, f"{command} {rest[0] if rest else ''}"):
        if name in COMMANDS:
            return name, arguments[len(name.split()) :]
    actions = [name.split()[1] for name in COMMANDS if name.startswith(f"{command} ")]
    if not actions:
        raise UserError(f"command is {command!r}; expected {_one_of(command, (name.split()[0] for name in COMMANDS))}")
    if rest and rest[0] not in ("-h", "--help"):
        raise UserError(f"{command} is followed by {rest[0]!r}; expected {_one_of(rest[0], actions)}")
    return f"{command} {actions[0]}", ["--help"]


def _one_of(name: str, known: Iterable[str]) -> str:
    known = list(known)
    return f"{'one of ' if len(known) > 1 else ''}{', '.join(known)}{nearest_name(name, known)}"


def _help() -> str:
    commands = "\n".join(f"  {name:<12}  {command.summary}" for name, command in COMMANDS.items())
    return (
        "usage: avatarl COMMAND [options]\n\n"
        "Train small language models from scratch with rewards instead of labels.\n\n"
        f"{commands}\n\n"
        "avatarl COMMAND --help shows a command's options; --debug shows tracebacks."
    )


def _end(message: object, status: int, debug: bool, prefix: str = "") -> int:
    """Print why in one line; with ``--debug`` the traceback comes first."""
    if debug:
        import traceback

        traceback.print_exc()
    text = str(message).strip() or type(message).__name__
    print(f"avatarl: {_process()}{one_line(prefix + text)}", file=sys.stderr)
    return status


def _is_unread() -> bool:
    """Whether stdout or stderr is a pipe that nobody reads any more."""
    poll = select.poll()
    for descriptor in OUTPUTS:
        poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _process() -> str:
    """Name this process if it is one of several but not the first, which speaks for all."""
    rank, count = os.environ.get("RANK") or "0", os.environ.get("WORLD_SIZE") or "1"
    return "" if rank == "0" or count == "1" else f"process {rank}: "


def _quiet_libraries() -> None:
    """Silence the progress bars, advice and layer-by-layer warnings of libraries that are imported later."""
    from logging import getLogger

    for name in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")  # a bar moves the terminal's cursor
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for library in ("bitsandbytes", "torchao"):
        getLogger(library).setLevel("ERROR")
