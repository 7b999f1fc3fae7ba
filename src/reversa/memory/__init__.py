"""What training costs in memory: estimated without computing, and measured."""

from reversa.memory.estimate import estimate
from reversa.memory.live import LiveBytes
from reversa.memory.measure import measure
from reversa.memory.report import Flops, MemoryReport, Moment, StageMemory

__all__ = ["Flops", "LiveBytes", "MemoryReport", "Moment", "StageMemory", "estimate", "measure"]
