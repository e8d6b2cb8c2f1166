"""Arms by seeds: runs that differ in what is compared and in nothing else, and what can be said of the difference."""

from .compare import compare
from .config import ComparisonConfig, TuningConfig

__all__ = ["ComparisonConfig", "TuningConfig", "compare"]
