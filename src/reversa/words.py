"""Numbers and tables as people read them."""

from __future__ import annotations


def in_bytes(count: float) -> str:
    """Bytes in words, with a unit of two to the power of ten.

    >>> in_bytes(0), in_bytes(1536), in_bytes(11.618 * 2**30)
    ('0 B', '1.50 KiB', '11.62 GiB')
    """
    unit = "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1024:
            break
        count, unit = count / 1024, larger
    return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"


def aligned(rows: list[tuple[str, ...]], last_left: bool = False, left: bool = False) -> list[str]:
    """Lines of a table: names to the left, numbers to the right.

    Args:
        rows: cells.
        last_left: the last column to the left, too.
        left: every column to the left.

    >>> aligned([("a", "10"), ("bc", "2")])
    ['a   10', 'bc   2']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row: tuple[str, ...]) -> str:
        cells = [
            cell.ljust(width) if left or i == 0 or (last_left and i == len(row) - 1) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return [line(row) for row in rows]
