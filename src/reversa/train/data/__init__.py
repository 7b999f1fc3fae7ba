"""Data sets for training, and the one table of them."""

from __future__ import annotations

from collections.abc import Callable

from reversa.errors import SettingError, nearest
from reversa.train.data.base import Batches, DataSet, Split
from reversa.train.data.digits import digits, digits32

# A new data set is one file and one line here. Each is a function without arguments that loads it.
DATASETS: dict[str, Callable[[], DataSet]] = {
    "digits": digits,
    "digits32": digits32,
}


def dataset_named(name: str) -> Callable[[], DataSet]:
    """What loads the data set of that name.

    Raises:
        SettingError: no data set has that name; the message lists the nearest ones.
    """
    if name not in DATASETS:
        raise SettingError(nearest(name, DATASETS, "data set"))
    return DATASETS[name]


__all__ = ["DATASETS", "Batches", "DataSet", "Split", "dataset_named", "digits", "digits32"]
