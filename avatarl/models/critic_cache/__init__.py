"""A critic's answers on disk: read once over the data, asked in every epoch of every run."""

from .read import CriticCache, is_cache
from .record import RecordFormat
from .write import cache_critic

__all__ = ["CriticCache", "RecordFormat", "cache_critic", "is_cache"]
