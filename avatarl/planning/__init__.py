"""What a run will take, before it is started: FLOPs, memory, time and disk."""

from .plan import UTILISATION, Plan, plan
from .table import plan_table

__all__ = ["UTILISATION", "Plan", "plan", "plan_table"]
