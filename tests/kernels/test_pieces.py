"""How sequences are cut into pieces at their beginnings, and how rows and states are moved."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.kit.build import native

SEEDS = range(20)


@dataclasses.dataclass(frozen=True)
class RandomSequences:
    """Sequences with beginnings at random, padded or packed.

    Attributes:
        lengths: [N].
        batch_sizes: [T] if the rows are packed, else empty.
        starts: one number for each row of the caller, 1 at a beginning.
        row: row[t][n] is the number of the caller's row.
    """

    lengths: np.ndarray
    batch_sizes: list[int]
    starts: np.ndarray
    row: list[list[int]]

    def pieces(self) -> list[tuple[int, int, int]]:
        """Sequence, first step and length of all pieces in the order of their sequences."""
        cut = []
        for n, length in enumerate(self.lengths):
            begins = [t for t in range(1, length) if self.starts[self.row[t][n]]]
            ends = [*begins, int(length)]
            cut += [(n, a, b - a) for a, b in zip([0, *begins], ends, strict=True)]
        return cut


def random_sequences(rng: np.random.Generator) -> RandomSequences:
    N, T = int(rng.integers(0, 12)), int(rng.integers(1, 20))
    lengths, batch_sizes = rng.integers(0, T + 1, size=N), []
    row = [[t * N + n for n in range(N)] for t in range(T)]
    rows = T * N
    if N and rng.random() < 0.5:
        lengths = np.sort(np.maximum(lengths, 1))[::-1]
        batch_sizes = [int((lengths > t).sum()) for t in range(lengths[0])]
        offset = [0, *np.cumsum(batch_sizes)]
        row = [[int(offset[t]) + n for n in range(N)] for t in range(len(batch_sizes))]
        rows = sum(batch_sizes)
    starts = (rng.random(rows) < rng.choice([0, 0.1, 0.5, 1])).astype(np.int64)
    return RandomSequences(lengths, batch_sizes, starts, row)


@pytest.mark.parametrize("seed", SEEDS)
def test_pieces(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(100):
        batch = random_sequences(rng)
        cut = native().Pieces(batch.lengths.tolist(), batch.batch_sizes, batch.starts)
        # The longest pieces come first. There is nothing between them, and nothing twice.
        lengths = [length for _, _, length in cut.pieces]
        assert lengths == sorted(lengths, reverse=True)
        assert sorted(map(tuple, cut.pieces)) == batch.pieces()
        assert cut.batch_sizes == [
            sum(length > t for length in lengths) for t in range(max(lengths, default=0))
        ]
        assert cut.row_offset == [0, *np.cumsum(cut.batch_sizes)]


def test_without_beginnings_sequences_of_one_length_keep_their_order() -> None:
    starts = np.zeros(24, np.int64)
    cut = native().Pieces([3, 5, 3, 5], [], starts)
    assert cut.pieces == [[1, 0, 5], [3, 0, 5], [0, 0, 3], [2, 0, 3]]
    assert not cut.in_place
    assert native().Pieces([6, 6, 6, 6], [], starts).in_place
    starts[2] = 1  # at the first step nothing is cut
    assert native().Pieces([6, 6, 6, 6], [], starts).in_place
    starts[4] = 1
    assert not native().Pieces([6, 6, 6, 6], [], starts).in_place


@pytest.mark.parametrize("seed", SEEDS)
def test_rows_and_states_of_pieces(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(30):
        batch = random_sequences(rng)
        cut = native().Pieces(batch.lengths.tolist(), batch.batch_sizes, batch.starts)
        width = 3
        given = rng.integers(1, 1 << 40, size=(len(batch.starts), width))
        live = [
            [batch.row[first + t][n] for n, first, length in cut.pieces if length > t]
            for t in range(len(cut.batch_sizes))
        ]
        rows = np.array([r for step in live for r in step], int)
        packed = cut.pack(given)
        np.testing.assert_array_equal(packed, given[rows])

        # On the way back the live rows are restored, and no others are written.
        back = cut.unpack(packed, np.full_like(given, -1))
        is_live = np.isin(np.arange(len(given)), rows)
        np.testing.assert_array_equal(back, np.where(is_live[:, None], given, -1))

        N, M = len(batch.lengths), len(cut.pieces)
        head = {n: j for j, (n, first, _) in enumerate(cut.pieces) if first == 0}
        tail = {
            n: j
            for j, (n, first, length) in enumerate(cut.pieces)
            if first + length == batch.lengths[n]
        }
        of_caller = rng.integers(1, 1 << 40, size=(2, N, width))
        of_pieces = rng.integers(1, 1 << 40, size=(2, M, width))
        for at_begin in (True, False):
            how = {"at_begin": at_begin}
            taken = cut.move_states(of_caller, np.zeros_like(of_pieces), take=True, **how)
            given_back = cut.move_states(of_pieces, np.zeros_like(of_caller), take=False, **how)
            wanted, wanted_back = np.zeros_like(of_pieces), np.zeros_like(of_caller)
            for d in range(2):
                for n in range(N):
                    at_row = batch.row[0][n] if batch.lengths[n] else 0
                    begins = batch.lengths[n] > 0 and batch.starts[at_row] > 0
                    if at_begin and d == 0 and begins:
                        continue  # the state before a beginning counts for nothing
                    j = head[n] if at_begin == (d == 0) else tail[n]
                    wanted[d, j], wanted_back[d, n] = of_caller[d, n], of_pieces[d, j]
            np.testing.assert_array_equal(taken, wanted)
            np.testing.assert_array_equal(given_back, wanted_back)


def test_many_short_sequences_beside_a_long_one() -> None:
    """The time is that of the rows. With steps times sequences this test would take hours."""
    n = 1_000_000
    batch_sizes = [n] + [1] * (n - 1)
    starts = np.zeros(2 * n - 1, np.int64)
    starts[-1] = 1
    cut = native().Pieces([n] + [1] * (n - 1), batch_sizes, starts)
    assert cut.pieces[:2] == [[0, 0, n - 1], [1, 0, 1]] and len(cut.pieces) == n + 1
