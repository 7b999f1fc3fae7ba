"""Names and arguments of other packages, on Reversa's engine. None of those packages is needed."""

from __future__ import annotations
