"""The loss in a plain PyTorch loop: ``python examples/plain_loop.py DATA CRITIC``.

DATA is a folder made by ``avatarl prepare``. CRITIC is a run, a model folder or a hub id with the same tokenizer, or a
folder made by ``avatarl critic cache``.
"""

import torch
from jsonargparse import auto_cli

from avatarl import AvataRLConfig, linear_avatarl_loss
from avatarl.data import PreparedData, WindowOrder, Windows
from avatarl.models import PlayerConfig, build_player, open_critic
from avatarl.models.critics import CriticInputs


def main(data: str, critic: str, steps: int = 100, block_size: int = 128, batch: int = 8) -> list[float]:
    """Train a player of a million parameters; return the cross-entropy of each step (nats per token)."""
    prepared = PreparedData.open(data)
    tokenizer = prepared.load_tokenizer()
    windows = Windows(prepared.train, block_size)
    order = WindowOrder(len(windows), seed=1)

    opened = open_critic(critic, tokenizer, block_size=block_size, data=prepared)  # a model or a cache
    player = build_player(PlayerConfig(preset="1m"), tokenizer, block_size, seed=1)
    optimizer = torch.optim.AdamW(player.parameters(), lr=1e-3)
    settings = AvataRLConfig.article()

    cross_entropies = []
    for step in range(steps):
        indices = order.indices(step * batch, batch)
        inputs, targets = windows.batch(indices)  # (batch, block_size) each
        hidden = player.base_model(input_ids=inputs).last_hidden_state  # (batch, block_size, width)
        answers = opened.answers(CriticInputs(inputs, "train", indices))
        head = player.get_output_embeddings().weight
        loss, metrics = linear_avatarl_loss(hidden, head, answers, None, targets, settings, vocab_size=len(tokenizer))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(player.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        cross_entropies.append(metrics["cross_entropy"].item())
        print(f"step {step + 1}: loss {loss.item():.4f}, cross-entropy {cross_entropies[-1]:.4f}")
    return cross_entropies


if __name__ == "__main__":
    auto_cli(main)
