"""Stage merge: streaming merge of stacked LoRA adapters into full weights."""
