"""Lengths into groups: bins that are filled to the brim, and batches that are padded little."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

_CALL_TOKENS = 64
"""What one more batch costs besides its tokens, in tokens: some calls of small kernels. From 0 to 200 the choice hardly matters."""


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit-decreasing bin packing: indices of each bin, the longest item of all in the first bin.

    An item goes into the bin that it fills best; about 11/9 of the least number of bins is its worst case (Johnson 1973).
    An item above ``capacity`` has a bin of its own.
    """
    bins: list[list[int]] = []
    room: dict[int, list[int]] = {}  # free space to the bins that have so much
    sizes: list[int] = []  # the keys of room, ascending
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect_left(sizes, lengths[item])
        if at < len(sizes):
            left = sizes[at]
            number = room[left].pop()
            if not room[left]:
                del room[left], sizes[at]
        else:
            left, number = max(capacity, lengths[item]), len(bins)
            bins.append([])
        bins[number].append(item)
        left -= lengths[item]
        if left:
            if left not in room:
                room[left] = []
                insort(sizes, left)
            room[left].append(number)
    return bins


def by_length(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Items sorted by length and cut into batches of at most ``capacity`` padded tokens, so that the whole costs least.

    Longest first. An item above ``capacity`` is a batch of its own. The cost of a batch is its padded tokens plus a constant;
    the best cut of the sorted items is found by dynamic programming over their prefixes.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    costs, cut = [0], [0]
    for end in range(1, len(order) + 1):
        best, start = None, end - 1
        for first in range(end - 1, -1, -1):
            padded = lengths[order[first]] * (end - first)
            if padded > capacity and first < end - 1:
                break
            cost = costs[first] + padded + _CALL_TOKENS
            if best is None or cost < best:
                best, start = cost, first
        assert best is not None
        costs.append(best)
        cut.append(start)
    groups: list[list[int]] = []
    end = len(order)
    while end:
        groups.append(order[cut[end] : end])
        end = cut[end]
    return groups[::-1]
