"""How good a model is: on held-out text, on minimal pairs, on tasks of the lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from avatarl.errors import UserError
from avatarl.objective.config import AvataRLConfig


def evaluate(
    model: str | Path,
    data: str | Path | None = None,
    *,
    critic: str | Sequence[str] | None = None,
    avatarl: AvataRLConfig | None = None,
    split: str = "valid",
    block_size: int | None = None,
    max_windows: int | None = None,
    pairs: str | Path | None = None,
    tasks: str | None = None,
    include_path: str | Path | None = None,
    device: str = "auto",
) -> dict:
    """Evaluate a model on held-out text, minimal pairs and tasks of the lm-evaluation-harness, in float32.

    Args:
        model: A run folder (its best player), a model folder or a hub id.
        data: A prepared data folder with the model's vocabulary: likelihood, accuracy and calibration on its text.
        critic: Critics or their caches: adds the reward metrics on data.
        avatarl: Settings of these rewards; the article's when None.
        split: Of data: valid or train.
        block_size: Of data: tokens in a window; the model's context when None.
        max_windows: Of data: read only the first windows, this many.
        pairs: Minimal pairs: a .jsonl file or a folder of them.
        tasks: Tasks, groups and tags of the lm-evaluation-harness: NAME,NAME.
        include_path: Of tasks: a folder with your own (YAML). They may name Python functions, which the harness runs.
        device: cpu, cuda or auto.

    Returns:
        Of data: cross_entropy and entropy (nats per token), perplexity, bits_per_byte (special tokens have no bytes;
        where it is None bits_per_byte_missing says why), top1_accuracy and top16_accuracy, expected_calibration_error
        with its reliability table (bins of equal width over the top token's probability), top16_calibration_error with
        its top16_reliability (the same of the 16 most likely tokens, each a forecast of its own, in bins of halving
        width), tokens, bytes, windows, block_size, split, and with a critic rewards and reward_settings. Of pairs:
        minimal_pairs, see :func:`~avatarl.results.score_pairs`. Of tasks: harness, see
        :func:`~avatarl.results.run_tasks`.

    Raises:
        UserError: The model, data, critic, pairs or tasks cannot be used, or do not fit each other.
    """
    if data is None and pairs is None and tasks is None:
        raise UserError("nothing to evaluate on; expected data (a prepared folder), pairs (.jsonl) or tasks (by name)")
    options_of_data = {"critic": critic, "block_size": block_size, "max_windows": max_windows}
    if split != "valid":
        options_of_data["split"] = split
    for what, value, options in (("data", data, options_of_data), ("tasks", tasks, {"include_path": include_path})):
        for name, given in options.items():
            if value is None and given is not None:
                raise UserError(f"{name} is {given!r}, which is an option of {what}; expected {what} too")

    from .harness import open_tasks, run_tasks
    from .likelihood import evaluate_text
    from .minimal_pairs import read_pairs, score_pairs
    from .players import open_player

    # What is quickly found wrong comes before what takes long.
    found_pairs = None if pairs is None else read_pairs(pairs)
    found_tasks = None if tasks is None else open_tasks(tasks, include_path)
    player = open_player(model, device)
    result = {}
    if data is not None:
        critics = [critic] if isinstance(critic, str) else list(critic or [])
        result = evaluate_text(
            player, data, critics, avatarl or AvataRLConfig.article(), split, block_size, max_windows
        )
    if found_pairs is not None:
        result["minimal_pairs"] = score_pairs(player, found_pairs)
    if found_tasks is not None:
        result["harness"] = run_tasks(player, found_tasks)
    return result
