"""What a run will take, before it is started: FLOPs, memory, time and disk."""

from .plan import UTILISATION, Plan, plan

__all__ = ["UTILISATION", "Plan", "plan"]
