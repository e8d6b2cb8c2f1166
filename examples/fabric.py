"""The same under Lightning Fabric, on one process or many: ``python examples/fabric.py DATA CRITIC --devices 2``."""

import torch
from jsonargparse import auto_cli
from lightning_fabric import Fabric  # or `from lightning.fabric import Fabric`, which is the same

from avatarl.data import PreparedData, WindowOrder, Windows
from avatarl.models import PlayerConfig, build_player, open_critic
from avatarl.models.critics import CriticInputs
from avatarl.objective import AvataRLConfig, make_objective
from avatarl.training.model import PlayerWithLoss


def main(
    data: str,
    critic: str,
    steps: int = 100,
    block_size: int = 128,
    batch: int = 8,
    devices: int = 1,
    precision: str = "32",
) -> list[float]:
    """Train a player of a million parameters; return the cross-entropy of each step (nats per token)."""
    fabric = Fabric(devices=devices, precision=precision)
    fabric.launch()
    prepared = PreparedData.open(data)
    tokenizer = prepared.load_tokenizer()
    windows = Windows(prepared.train, block_size)
    order = WindowOrder(len(windows), seed=1)
    share = batch // fabric.world_size  # as many windows for each process, so that a mean of means is right

    opened = open_critic(critic, tokenizer, block_size=block_size, device=fabric.device)
    player = build_player(PlayerConfig(preset="1m"), tokenizer, block_size, seed=1)
    # The loss is computed inside of what Fabric wraps: outside, gradients would not be averaged over processes.
    model = PlayerWithLoss(player, make_objective("avatarl", AvataRLConfig.article()), len(tokenizer))
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=1e-3))

    cross_entropies = []
    for step in range(steps):
        mine = order.indices(step * batch + fabric.global_rank * share, share)
        inputs, targets = (tensor.to(fabric.device) for tensor in windows.batch(mine))  # (share, block_size) each
        with torch.no_grad(), fabric.autocast():
            answers = [opened.answers(CriticInputs(inputs))]
        loss, metrics = model(inputs, targets, answers)
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        cross_entropies.append(fabric.all_reduce(metrics["cross_entropy"], reduce_op="mean").item())
        fabric.print(f"step {step + 1}: cross-entropy {cross_entropies[-1]:.4f}")
    return cross_entropies


if __name__ == "__main__":
    auto_cli(main)
