"""Tasks of EleutherAI's lm-evaluation-harness on a player, opened as everywhere here: safetensors, float32."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from avatarl.errors import UserError, nearest_name
from avatarl.hub import require_on_hub
from avatarl.untrusted import refusing

from .players import open_player

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

SEQUENCES_AT_ONCE = 8
KEPT = ("results", "groups", "n-shot", "n-samples", "versions", "lm_eval_version")


def open_tasks(names: str, include_path: str | Path | None = None) -> list[Task | Group]:
    """Find tasks and load their data.

    Args:
        names: Tasks, groups and tags by name, joined by commas.
        include_path: A folder with tasks of your own (YAML). Such a task may name Python functions beside it, which
            the harness runs.

    Raises:
        UserError: The harness is not installed, a task is unknown, or its data cannot be had.
    """
    if include_path is not None and not os.path.isdir(include_path):
        raise UserError(f"include_path is {str(include_path)!r}; expected a folder with tasks of the harness (YAML)")
    with _harness_needed():
        from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=include_path)
    wanted = [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in manager.task_index:
            raise UserError(
                f"tasks names {name!r}, which neither the harness nor include_path has"
                f"{nearest_name(name, manager.all_tasks)}"
            )
    opened = [part for name in wanted for part in _open(name, manager)]
    with refusing("tasks: "):
        manager.load(opened)  # refuses a task that is named twice, alone and in a group
    return opened


def run_tasks(model: str | Path, tasks: Sequence[Task | Group], *, device: str = "auto") -> dict:
    """Run tasks on a model as the harness itself does.

    Args:
        model: A run folder (its best player), a model folder or a hub id.
        tasks: From :func:`open_tasks`.
        device: ``cpu``, ``cuda`` or ``auto``.

    Returns:
        What the harness reports of the tasks: ``results`` (the metrics of each), ``groups``, ``n-shot``,
        ``n-samples``, ``versions`` and ``lm_eval_version``.

    Raises:
        UserError: The harness is not installed or the model cannot be used.
    """
    with _harness_needed():
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

    player = open_player(model, device)
    wrapped = HFLM(pretrained=player.model, tokenizer=player.tokenizer, batch_size=SEQUENCES_AT_ONCE)
    found = simple_evaluate(wrapped, tasks=list(tasks), log_samples=False)
    return {name: found[name] for name in KEPT if name in found}


def _open(name: str, manager: TaskManager) -> list[Task | Group]:
    """A task or a group, or the tasks that a tag stands for."""
    needs = f"task {name!r} needs its data from the Hugging Face Hub"
    with refusing(f"task {name!r} cannot be opened: "):
        try:
            for dataset in dict.fromkeys(_hub_datasets(name, manager)):
                require_on_hub(dataset, "dataset")
            loaded = manager.load(name)
        except UserError as error:
            raise UserError(f"{needs}: {error}") from error
        except ConnectionError as error:
            raise UserError(
                f"{needs}, which cannot be reached ({error}); expected a network, the data in the local cache, or a "
                "task of local files"
            ) from error
    group = loaded["groups"].get(name)
    return [group] if group else list(loaded["tasks"].values())


def _hub_datasets(name: str, manager: TaskManager) -> Iterator[str]:
    """The Hub's datasets that the YAML of a task, or of the tasks of a group or tag, names."""
    entry = manager.task_index.get(name)
    if entry is None:
        return
    if entry.cfg is None:  # a tag
        members = sorted(entry.tags)
    else:
        path = entry.cfg.get("dataset_path")
        if isinstance(path, str) and "/" in path and not os.path.exists(path):
            yield path
        members = [member for member in entry.cfg["task"] if isinstance(member, str)] if "group" in entry.cfg else []
    for member in members:
        yield from _hub_datasets(member, manager)


@contextmanager
def _harness_needed() -> Iterator[None]:
    """Report in one line where the harness, or what it needs, is not installed."""
    try:
        yield
    except ImportError as error:
        raise UserError(f"tasks need the lm-evaluation-harness ({error}); pip install 'avatarl[eval]'") from error
