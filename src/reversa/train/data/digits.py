"""1,797 handwritten digits that come with scikit-learn: real images, and nothing to download."""

from __future__ import annotations

import torch
from torch import Generator, Tensor
from torch.nn.functional import interpolate, pad

from reversa.errors import import_extra
from reversa.train.data.base import DataSet, Split

VAL, TEST = 180, 360
SPLIT_SEED = 0  # the split belongs to the data, not to the run: runs with other seeds are tested on the same images


def digits() -> DataSet:
    """The digits: 8 x 8 pixels, 10 classes; 1,257 to train on, 180 to choose by, 360 to test with.

    The split is stratified and always the same; images are normalised by mean and deviation of the training images.

    Source: E. Alpaydin, C. Kaynak: Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998.

    Raises:
        MissingExtra: scikit-learn is not installed.

    >>> data = digits()
    >>> data.train.images.shape, len(data.val.labels), len(data.test.labels)
    (torch.Size([1257, 1, 8, 8]), 180, 360)
    """
    datasets = import_extra("sklearn.datasets", "train")
    selection = import_extra("sklearn.model_selection", "train")
    pixels, classes = datasets.load_digits(return_X_y=True)
    rest, test = selection.train_test_split(
        range(len(classes)), test_size=TEST, stratify=classes, random_state=SPLIT_SEED
    )
    train, val = selection.train_test_split(rest, test_size=VAL, stratify=classes[rest], random_state=SPLIT_SEED)
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8)
    mean, deviation = images[train].mean(), images[train].std()
    images, labels = (images - mean) / deviation, torch.tensor(classes)
    black = float(-mean / deviation)
    splits = (Split(images[part], labels[part]) for part in (train, val, test))
    return DataSet(*splits, num_classes=10, augment=lambda batch, generator: shifted(batch, generator, fill=black))


def digits32() -> DataSet:
    """The digits enlarged to 32 x 32 pixels, for networks that are built for images of that size; else as they are.

    >>> digits32().test.images.shape
    torch.Size([360, 1, 32, 32])
    """
    small = digits()
    sizes = (split._replace(images=_enlarged(split.images)) for split in (small.train, small.val, small.test))
    black = float(small.train.images.min())
    return DataSet(*sizes, num_classes=10, augment=lambda batch, generator: shifted(batch, generator, fill=black, by=4))


def _enlarged(images: Tensor) -> Tensor:
    return interpolate(images, size=(32, 32), mode="bilinear", align_corners=False)


def shifted(images: Tensor, generator: Generator, fill: float, by: int = 1) -> Tensor:
    """Every image moved by -by to by pixels along each axis, at random; what comes in is ``fill``."""
    number, _, height, width = images.shape
    down, right = torch.randint(2 * by + 1, (2, number), generator=generator)
    framed = pad(images, (by, by, by, by), value=fill)
    rows = (down[:, None] + torch.arange(height))[:, None, :, None]
    columns = (right[:, None] + torch.arange(width))[:, None, None, :]
    channels = torch.arange(images.shape[1])[:, None, None]
    return framed[torch.arange(number)[:, None, None, None], channels, rows, columns]
