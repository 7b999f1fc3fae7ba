"""What PyTorch's own allocator says: an oracle of memory that knows no tensors."""

from __future__ import annotations

import gc

from torch.profiler import ProfilerActivity, profile


def allocator_peak(function) -> int:
    """The largest sum of the CPU allocator's events while ``function`` runs."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        function()
    events = sorted(
        (e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
    )
    live = peak = 0
    for event in events:
        live += event.nbytes()
        peak = max(peak, live)
    return peak
