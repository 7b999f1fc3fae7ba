"""What gives the backward pass the state of step k when it needs it. Autograd only, no formula."""

from reversa.engine.invert import Invert
from reversa.engine.mixed import Mixed
from reversa.engine.policies import Engine, Offload, Recompute, Store
from reversa.engine.replay import is_replaying
from reversa.engine.steps import Steps

__all__ = ["Engine", "Invert", "Mixed", "Offload", "Recompute", "Steps", "Store", "is_replaying"]
