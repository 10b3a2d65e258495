"""Memory of stage dapt's data path for a corpus of ten gigabytes: from the token store to the planned steps.

    python bench/corpus.py [--chunks 1250000] [--workdir DIR]

Tokenizing such a corpus takes hours and streams a few chunks at a time, which ``tests/trainer/test_store.py`` bounds; what grows with
the corpus is everything after it. So the store is written as tokenizing would leave it, with lengths and hashes drawn at random and the
tokens a sparse file, and the stage's own functions hold chunks out, pack blocks, hash the rows, plan an epoch and read rows.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import numpy

from parampara.schemas.stages import DaptConfig, TextData
from trainer import blocks
from trainer.layout import Layout
from trainer.steps import plan_steps
from trainer.store import TokenStore

GOAL_MIB = 2048
_ROWS_READ = 250


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=1_250_000, help="of 1,200 to 2,047 tokens each")
    parser.add_argument("--workdir", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.workdir) as folder:
        tokens = _make(Path(folder) / "store", options.chunks)
        config = DaptConfig(model=Path(folder), data=TextData(train=[Path(folder) / "corpus.txt"]))
        before, began = _peak_mib(), time.monotonic()
        with patch.object(blocks, "_tokenized", lambda *_: TokenStore(Path(folder) / "store")):
            data = blocks.build_rows(config, None, workdir=Path(folder))
        digest = data.sha256
        plan = plan_steps(config, data, Layout("flat", "", max_tokens=8192, pad_token_id=0))
        for number in range(0, len(data.train), max(1, len(data.train) // _ROWS_READ)):
            assert data.train[number].trained
    print(f"{options.chunks:,} chunks, {tokens / 1e9:.2f} G tokens, {len(data.train):,} rows ({digest[:12]}), {plan.steps:,} steps")
    print(f"peak {_peak_mib():,} MiB (goal {GOAL_MIB}), {before:,} of it before; {time.monotonic() - began:.0f} s")


def _make(directory: Path, chunks: int) -> int:
    """A store as :func:`trainer.store.write_store` leaves it, but that its tokens are holes; returns how many there are."""
    directory.mkdir()
    chance = numpy.random.default_rng(0)
    lengths = chance.integers(1200, 2048, chunks)
    numpy.stack([lengths, numpy.arange(chunks)], axis=1).astype(numpy.int64).tofile(directory / "documents.raw")
    (directory / "chunks.raw").write_bytes(chance.bytes(32 * chunks))
    with (directory / "tokens.raw").open("wb") as file:
        file.truncate(int(lengths.sum()) * 4)
    return int(lengths.sum())


def _peak_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


if __name__ == "__main__":
    main()
