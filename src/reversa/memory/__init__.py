"""What training costs in memory, measured."""

from reversa.memory.live import LiveBytes

__all__ = ["LiveBytes"]
