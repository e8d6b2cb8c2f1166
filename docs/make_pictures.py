"""Draw the README's pictures from a finished demo: ``python docs/make_pictures.py runs/demo``."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import matplotlib
import torch

from avatarl import AvataRLConfig, reward_landscape
from avatarl.data import PreparedData, Windows
from avatarl.models import load_model, load_tokenizer

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

HERE = Path(__file__).parent
LOOKED_AT, SHOWN_ACTIONS = 300, 9


def main(demo: Path) -> None:
    """Write docs/landscape.png and docs/curves.png."""
    draw_landscape(demo, HERE / "landscape.png")
    shutil.copy(demo / "curves.png", HERE / "curves.png")


def draw_landscape(demo: Path, out: Path) -> None:
    """The rewards of the held-out position where most is paid to other tokens than the text's, drawn as bars."""
    tokenizer = load_tokenizer(demo / "avatarl")
    player, critic = load_model(demo / "avatarl"), load_model(demo / "critic")
    inputs, targets = Windows(PreparedData.open(demo / "data").valid, 64).batch(range(LOOKED_AT))
    with torch.no_grad():
        player_logits, critic_logits = player(inputs).logits, critic(inputs).logits
    landscape = reward_landscape(player_logits, critic_logits, targets, AvataRLConfig.article())
    paid = landscape.rewards > 0
    # Among positions where the critic finds the text's token possible and several actions are paid.
    interest = landscape.rewards[:, 1:].sum(1) * (paid.sum(1) >= 3) * paid[:, 0] * (landscape.critic[:, 0] > 0.001)
    position = int(interest.argmax())

    probs = player_logits.flatten(0, 1)[position].softmax(-1)
    order = landscape.critic[position].masked_fill(~landscape.valid[position], -1).argsort(descending=True)
    shown = sorted({0, *order[:SHOWN_ACTIONS].tolist()}, key=order.tolist().index)
    actions = landscape.actions[position, shown]
    labels = [repr(tokenizer.decode(token))[1:-1] for token in actions.tolist()]
    columns = {
        "reality p_R": landscape.reality[position, shown],
        "critic p_C": landscape.critic[position, shown],
        "consensus p": landscape.consensus[position, shown],
        "reward r": landscape.rewards[position, shown],
        "player π": probs[actions],
    }
    window, offset = divmod(position, targets.shape[1])
    context = tokenizer.decode(inputs[window, max(0, offset - 16) : offset + 1]).replace("\n", "⏎")

    figure, axes = pyplot.subplots(1, len(columns), figsize=(11, 3.6), sharey=True, layout="constrained")
    threshold = 1 / int(landscape.valid[position].sum())
    for axis, (title, values), colour in zip(
        axes, columns.items(), ("#009E73", "#D55E00", "#0072B2", "#0072B2", "#999999"), strict=True
    ):
        axis.barh(range(len(labels)), values.tolist(), color=colour)
        axis.set_title(title, size=11)
        axis.spines[["top", "right"]].set_visible(False)
        if title == "consensus p":
            axis.axvline(threshold, color="black", linewidth=1, linestyle="--")
            axis.annotate("1/n", (threshold, -0.5), xytext=(3, 2), textcoords="offset points", size=8)
    axes[0].set_yticks(
        range(len(labels)), [f"{'text: ' if k == 0 else ''}{x}" for k, x in zip(shown, labels, strict=True)]
    )
    axes[0].invert_yaxis()
    figure.suptitle(f"… {context} ▢", size=11)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
