"""Stage quantize: eight-bit weights with Unsloth, else bitsandbytes."""
