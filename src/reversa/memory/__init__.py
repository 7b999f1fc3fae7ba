"""What training costs in memory: estimated without computing, measured, and planned under a budget."""

from reversa.memory.estimate import estimate
from reversa.memory.live import LiveBytes
from reversa.memory.measure import measure
from reversa.memory.plan import curve, largest_size, plan
from reversa.memory.planned import Plan, Way
from reversa.memory.report import Flops, MemoryReport, Moment, StageMemory
from reversa.memory.speed import Speed

__all__ = [
    "Flops",
    "LiveBytes",
    "MemoryReport",
    "Moment",
    "Plan",
    "Speed",
    "StageMemory",
    "Way",
    "curve",
    "estimate",
    "largest_size",
    "measure",
    "plan",
]
