"""A number of bytes as people write it."""

from __future__ import annotations

import math

from reversa.errors import SettingError, nearest

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def bytes_of(budget: str | float) -> int:
    """A number of bytes.

    Raises:
        SettingError: not a number above 0 with a known unit.

    >>> bytes_of("16 GiB"), bytes_of("1.5MB"), bytes_of(4096)
    (17179869184, 1500000, 4096)
    """
    text = str(budget).strip()
    number = text.rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ")
    unit = text[len(number) :].strip() or "B"
    known = {name.lower(): size for name, size in UNITS.items()}
    try:
        size = float(number) * known[unit.lower()]
    except KeyError:
        raise SettingError(f"{budget!r}: {nearest(unit, UNITS, 'unit')}") from None
    except ValueError:
        size = math.nan
    if not (size >= 1 and math.isfinite(size)):
        raise SettingError(f"budget must be bytes above 0, such as '16 GiB' or 2**34, got {budget!r}")
    return int(size)
