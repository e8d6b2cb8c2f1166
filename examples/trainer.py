"""The same under transformers' Trainer: ``python examples/trainer.py DATA CRITIC OUT``."""

from jsonargparse import auto_cli
from transformers import TrainingArguments

from avatarl import AvataRLConfig
from avatarl.data import PreparedData
from avatarl.integrations.transformers import AvataRLTrainer, PreparedWindows
from avatarl.models import PlayerConfig, build_player


def main(
    data: str, critic: str, out: str, steps: int = 100, block_size: int = 128, batch: int = 8, bf16: bool = False
) -> dict[str, float]:
    """Train a player of a million parameters; return its evaluation (docs/metrics.md, each name after ``eval_``)."""
    prepared = PreparedData.open(data)
    tokenizer = prepared.load_tokenizer()
    trainer = AvataRLTrainer(
        build_player(PlayerConfig(preset="1m"), tokenizer, block_size, seed=1),
        TrainingArguments(
            out,
            max_steps=steps,
            per_device_train_batch_size=batch,
            learning_rate=1e-3,
            bf16=bf16,
            logging_steps=10,
            eval_strategy="steps",
            eval_steps=50,
            save_strategy="no",
        ),
        critics=critic,
        avatarl=AvataRLConfig.article(),
        processing_class=tokenizer,
        train_dataset=PreparedWindows(prepared, "train", block_size),
        eval_dataset=PreparedWindows(prepared, "valid", block_size),
    )
    trainer.train()
    trainer.save_model()  # an ordinary model folder with its tokenizer
    return trainer.evaluate()


if __name__ == "__main__":
    auto_cli(main)
