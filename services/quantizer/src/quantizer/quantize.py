"""Stage quantize: a merged model in, an eight-bit model that vLLM serves out (``w8a16`` needs a GPU there).

The schemes of the parameters are tried in order. Each attempt is recorded with the reason that was found or raised; the
first that gives a checkpoint which answers like its parent is kept. Nothing of a failed attempt remains.
"""

from __future__ import annotations

import functools
import os
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from parampara.errors import InvalidData, InvalidRequest, OutOfMemory, Preempted
from parampara.execution import stop
from parampara.progress import Progress
from parampara.schemas.stages import QuantizeConfig, QuantizeResult, Scheme, SchemeAttempt
from parampara.storage import fsync_tree
from quantizer.backends import SchemeUnavailable, bitsandbytes, compressed, unsloth
from quantizer.checkpoint import Agreement, agreement, faults_as, next_token_log_probs, quantized_weights, read_config, weight_bytes

if TYPE_CHECKING:
    import torch

MAX_KL = 0.1
"""Nats per token above which a checkpoint is broken rather than rounded: LLM.int8 and W8A8 measure 1e-5 to 1e-2."""


def run(config: QuantizeConfig, *, workdir: Path, progress: Progress) -> QuantizeResult:
    """Quantize ``config.model`` into ``workdir / "output"``.

    Raises:
        InvalidData: the model directory is not a complete, unquantized model.
        Diverged: a weight of the model is infinite or not a number.
        InvalidRequest: no scheme of ``params.schemes`` could run; the message holds every reason.
        OutOfMemory: the model does not fit this machine in the scheme that ran.
        Preempted: asked to stop; the next attempt starts the stage again.
    """
    started = time.monotonic()
    read_config(config.model)
    staging, output = workdir / "staging", workdir / "output"
    shutil.rmtree(output, ignore_errors=True)
    attempts: list[SchemeAttempt] = []
    total = len(config.params.schemes) + 1
    # asked for once something is written: until then a GPU belongs to the process that writes
    expected = functools.cache(lambda: _of_the_parent(config.model))
    for index, scheme in enumerate(config.params.schemes):
        _poll()
        shutil.rmtree(staging, ignore_errors=True)
        progress.phase(f"quantize with {scheme}")
        try:
            measured = _attempt(scheme, config, staging, progress, expected=expected)
        except SchemeUnavailable as unavailable:
            attempts.append(SchemeAttempt(scheme=scheme, ok=False, reason=unavailable.message))
            progress.event(f"{scheme} cannot run: {unavailable.message}", level="warn", scheme=scheme)
            progress.step(index + 1, total)
            continue
        finally:
            shutil.rmtree(workdir / "scratch", ignore_errors=True)
        reason = f"checked against its parent: KL {measured.kl:.2e} nats per token, same most likely token {measured.top1:.1%}"
        attempts.append(SchemeAttempt(scheme=scheme, ok=True, reason=reason))
        progress.step(total, total, kl=measured.kl, top1=measured.top1)
        return _publish(config, staging, output, attempts=attempts, started=started)
    shutil.rmtree(staging, ignore_errors=True)
    told = "; ".join(f"{attempt.scheme}: {attempt.reason}" for attempt in attempts)
    raise InvalidRequest(f"No scheme of params.schemes could run. {told}", param="params.schemes", code="no_scheme_ran")


def check(expected: torch.Tensor, written: Path) -> Agreement:
    """Load a written checkpoint from its files and compare it with ``expected``, its parent's :func:`next_token_log_probs`.

    Raises:
        SchemeUnavailable: it cannot be loaded, nothing is in eight bits, the output head is too, or it does not answer like its parent.
        OutOfMemoryError, MemoryError: it does not fit this machine.
    """
    with faults_as(lambda fault: SchemeUnavailable(f"The written checkpoint cannot be loaded: {fault}")):
        names = quantized_weights(written)
        got = next_token_log_probs(written)
    if not names:
        raise SchemeUnavailable("The written checkpoint holds no eight-bit weight.")
    if heads := [name for name in names if name.startswith("lm_head")]:
        raise SchemeUnavailable(f"The output head was quantized too ({heads[0]}): answers would change.")
    if got.shape != expected.shape:
        raise SchemeUnavailable(f"The checkpoint has a vocabulary of {got.shape[-1]}, its parent one of {expected.shape[-1]}.")
    measured = agreement(expected, got)
    if not measured.kl <= MAX_KL:
        raise SchemeUnavailable(f"The checkpoint does not answer like its parent: KL {measured.kl:.3g} nats per token, limit {MAX_KL}.")
    return measured


def _of_the_parent(model: Path) -> torch.Tensor:
    with faults_as(lambda fault: InvalidData(f"{model} cannot be loaded ({fault}).", param="model")):
        return next_token_log_probs(model)


def _write_unsloth(config: QuantizeConfig, staging: Path, progress: Progress) -> None:
    unsloth.write(config.model, staging, save_method=config.params.unsloth_save_method, scratch=staging.parent / "scratch")


def _write_bitsandbytes(config: QuantizeConfig, staging: Path, progress: Progress) -> None:
    bitsandbytes.write(config.model, staging)


def _write_streamed(config: QuantizeConfig, staging: Path, progress: Progress, *, scheme: compressed.StreamedScheme) -> None:
    compressed.write(config.model, staging, scheme=scheme, progress=progress)


_WRITERS: dict[Scheme, Callable[[QuantizeConfig, Path, Progress], None]] = {
    "unsloth": _write_unsloth,
    "bitsandbytes": _write_bitsandbytes,
    "w8a8": functools.partial(_write_streamed, scheme="w8a8"),
    "w8a16": functools.partial(_write_streamed, scheme="w8a16"),
    "fp8": functools.partial(_write_streamed, scheme="fp8"),
}


def _attempt(
    scheme: Scheme, config: QuantizeConfig, staging: Path, progress: Progress, *, expected: Callable[[], torch.Tensor]
) -> Agreement:
    """Write and check one checkpoint; leaves ``staging`` only if it is good."""
    import torch

    try:
        _WRITERS[scheme](config, staging, progress)
        _poll()
        progress.phase(f"check {scheme}")
        return check(expected(), staging)
    except (MemoryError, torch.OutOfMemoryError) as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise OutOfMemory(f"Out of memory in scheme {scheme}: {error}. Use a machine with more memory.", param="model") from None
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _publish(config: QuantizeConfig, staging: Path, output: Path, *, attempts: list[SchemeAttempt], started: float) -> QuantizeResult:
    for path in staging.iterdir():
        path.chmod(0o644)  # safetensors writes 0600, and the model server may run as another user
    fsync_tree(staging)
    os.rename(staging, output)
    return QuantizeResult(
        output=output,
        scheme=attempts[-1].scheme,
        attempts=attempts,
        bytes=weight_bytes(output),
        parent_bytes=weight_bytes(config.model),
        quantized_modules=len(quantized_weights(output)),
        seconds=time.monotonic() - started,
        peak_memory_bytes=1024 * max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)),
    )


def _poll() -> None:
    if stop.requested():
        raise Preempted("Asked to stop during quantization; the next attempt starts this stage again.")
