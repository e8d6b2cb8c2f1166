"""Which player to build: sizes by name, and the settings of a recipe. Plain Python, so that torch can wait."""

from __future__ import annotations

from dataclasses import dataclass, field

from avatarl.errors import UserError, nearest_name
from avatarl.objective.config import require_kinds


@dataclass(frozen=True)
class Shape:
    """The size of a decoder; feed-forward width is that of a gated (SwiGLU) layer."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int


# As Llama with tied embeddings. `1m` and `5m` name the parameters outside the embedding (1,004,928 and 4,967,680), the
# others all parameters with GPT-2's 50,257 tokens, as the article counts (29,920,512; 123,551,232; 250,726,400).
PRESETS = {
    "1m": Shape(hidden_size=128, num_hidden_layers=5, num_attention_heads=4, intermediate_size=352),
    "5m": Shape(hidden_size=256, num_hidden_layers=6, num_attention_heads=4, intermediate_size=736),
    "30m": Shape(hidden_size=384, num_hidden_layers=6, num_attention_heads=6, intermediate_size=1024),
    "124m": Shape(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=2048),
    "250m": Shape(hidden_size=1024, num_hidden_layers=16, num_attention_heads=16, intermediate_size=2688),
}


@dataclass(frozen=True)
class PlayerConfig:
    """Which model to build.

    Args:
        preset: The size, one of ``1m``, ``5m``, ``30m``, ``124m``, ``250m``.
        architecture: A causal language model of the transformers library by its model type: llama, gpt2, qwen3, …
        settings: Fields of that architecture's configuration that replace the preset's, as
            ``{"attention_dropout": 0.1}``.
    """

    preset: str = "1m"
    architecture: str = "llama"
    settings: dict[str, int | float | bool | str] = field(default_factory=dict)

    def __post_init__(self):
        require_kinds(self, "player.")
        if self.preset not in PRESETS:
            raise UserError(
                f"player.preset is {self.preset!r}; expected one of {', '.join(PRESETS)}"
                f"{nearest_name(self.preset, PRESETS)}"
            )
