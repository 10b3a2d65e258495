"""Stage evaluate: perplexity, exact answers, formats, parity ledger, gates and report."""
