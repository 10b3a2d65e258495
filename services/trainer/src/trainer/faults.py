"""What an exception of the libraries means, and giving back what it held."""

from __future__ import annotations


def is_out_of_memory(error: BaseException) -> bool:
    """Of a GPU (``torch.OutOfMemoryError``, and the texts of libraries that raise something else) or of this machine."""
    from accelerate.utils.memory import should_reduce_batch_size

    return isinstance(error, MemoryError) or (isinstance(error, Exception) and should_reduce_batch_size(error))


def release() -> None:
    """Give back what the failed attempt held. Call outside its ``except``: a traceback keeps every activation alive."""
    from accelerate.utils.memory import clear_device_cache

    clear_device_cache(garbage_collection=True)
