"""Text becomes tokens: sources, tokenizers, and the prepared folder that training reads."""

from __future__ import annotations

from avatarl.data.dataset import PreparedData, TokenStream, WindowOrder, Windows, spread
from avatarl.data.prepare import prepare

__all__ = ["PreparedData", "TokenStream", "WindowOrder", "Windows", "prepare", "spread"]
