"""Stage quantize: a merged model in, an eight-bit model that vLLM serves out (``w8a16`` needs a GPU there).

The schemes of the parameters are tried in order. Each attempt is recorded with its figures, or with the reason that was found or
raised; the first that gives a checkpoint which predicts held-out text and answers nearly as well as its parent is kept. Nothing of
another attempt remains.

With ``adapters`` the parent is what they make of the base, and no copy of it is written: the streamed schemes merge on the way.
"""

from __future__ import annotations

import functools
import math
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from parampara.errors import InvalidData, InvalidRequest, OutOfMemory
from parampara.progress import Progress
from parampara.schemas.stages import (
    OnePassMerge,
    QuantizeConfig,
    QuantizeParams,
    QuantizeResult,
    Scheme,
    SchemeAttempt,
    StreamedScheme,
)
from parampara.storage import fsync_tree
from parampara.weights.merged import MergedModel
from quantizer.backends import SchemeUnavailable, bitsandbytes, calibrated, check_stop, compressed, unsloth
from quantizer.checkpoint import faults_as, quantized_weights, read_config, weight_bytes
from quantizer.gate import NOTHING, Figures, HeldOut, Measured, compare, measure, read_held_out
from quantizer.part import Part

RECORD = "quantize.json"
"""The result, kept beside the weights."""
_NOT_RECORDED: Any = {"output": True, "seconds": True, "peak_memory_bytes": True, "attempts": {"__all__": {"seconds"}}}
"""What differs from run to run: equal inputs give equal files."""
_NOT_MEASURED = "neither loaded nor measured against the unquantized model, as asked (measure is false): what it costs is not known"
MAX_KL = 0.1
"""Nats per token above which a checkpoint is broken rather than rounded: LLM.int8 and W8A8 measure 1e-5 to 1e-2."""


def run(config: QuantizeConfig, *, workdir: Path, progress: Progress) -> QuantizeResult:
    """Quantize ``config.model``, with ``config.adapters`` merged into it on the way, into ``workdir / "output"``.

    Raises:
        InvalidData: the model directory is not a complete, unquantized model, the adapters do not belong to it, or the held-out data
            is faulty.
        Diverged: a weight of the model is infinite or not a number.
        InvalidRequest: no scheme of ``params.schemes`` could run and stay below ``params.max_degradation``; the message holds every
            reason and figure.
        OutOfMemory: the model does not fit this machine in the scheme that ran.
        Preempted: asked to stop; the next attempt starts the stage again.
    """
    started = time.monotonic()
    read_config(config.model)
    shutil.rmtree(workdir / "output", ignore_errors=True)
    check_stop()
    with _opened(config, progress) as model:
        progress.phase("read held-out data")
        parent = _Parent(config, model, read_held_out(config))
        if not config.measure:
            progress.event(f"{_NOT_MEASURED[0].upper()}{_NOT_MEASURED[1:]}.", level="warn")
        elif not parent.held_out.texts and not parent.held_out.answers:
            progress.event("No held-out data was given: schemes are not held against max_degradation.", level="warn")
        attempts = _try_in_order(parent, workdir / "staging", progress)
        return _publish(parent, workdir / "staging", workdir / "output", attempts=attempts, started=started)


def check(expected: Measured, written: Path, held_out: HeldOut = NOTHING, *, progress: Progress | None = None) -> Figures:
    """Load a written checkpoint from its files and compare it with ``expected``, which was measured on its parent with ``held_out``.

    Raises:
        SchemeUnavailable: it cannot be loaded, nothing is in eight bits, the output head is too, or it does not answer like its parent.
        OutOfMemoryError, MemoryError: it does not fit this machine.
        Preempted: asked to stop.
    """
    with faults_as(lambda fault: SchemeUnavailable(f"The written checkpoint cannot be loaded: {fault}")):
        names = quantized_weights(written)
        got = measure(written, held_out, progress, check_stop=check_stop)
    if not names:
        raise SchemeUnavailable("The written checkpoint holds no eight-bit weight.")
    if heads := [name for name in names if name.startswith("lm_head")]:
        raise SchemeUnavailable(f"The output head was quantized too ({heads[0]}): answers would change.")
    if got.probes.shape != expected.probes.shape:
        vocabularies = got.probes.shape[-1], expected.probes.shape[-1]
        raise SchemeUnavailable(f"The checkpoint has a vocabulary of {vocabularies[0]}, its parent one of {vocabularies[1]}.")
    figures = compare(expected, got)
    if not figures.kl <= MAX_KL:
        raise SchemeUnavailable(f"The checkpoint does not answer like its parent: KL {figures.kl:.3g} nats per token, limit {MAX_KL}.")
    return figures


class _Parent:
    """What is quantized. It is measured once, when something is written: until then a GPU belongs to the process that writes."""

    def __init__(self, config: QuantizeConfig, model: Path | MergedModel, held_out: HeldOut) -> None:
        self.config, self.model, self.held_out = config, model, held_out
        self._measured: Measured | None = None

    def measured(self, progress: Progress) -> Measured:
        if self._measured is None:
            progress.phase("measure the unquantized model")
            with faults_as(lambda fault: InvalidData(f"{self.config.model} cannot be loaded ({fault}).", param="model")):
                self._measured = measure(self.model, self.held_out, progress, check_stop=check_stop)
        return self._measured

    @property
    def merge(self) -> OnePassMerge | None:
        if isinstance(self.model, Path):
            return None
        return OnePassMerge(
            base_sha256=self.model.base_sha256,
            adapters=[adapter.sha256 for adapter in self.model.adapters],
            merged_tensors=len(self.model.changed),
            max_abs_delta=self.model.max_abs_delta,
        )


@contextmanager
def _opened(config: QuantizeConfig, progress: Progress) -> Iterator[Path | MergedModel]:
    """The model as it lies there; with adapters the one that they make of it, after all has been checked."""
    if not config.adapters:
        yield config.model
        return
    progress.phase("check base and adapters")
    with MergedModel(config.model, config.adapters) as model:
        yield model


def _write_unsloth(parent: _Parent, staging: Path, progress: Progress) -> None:
    config = parent.config
    unsloth.write(
        config.model, staging, save_method=config.params.unsloth_save_method, scratch=staging.parent / "scratch", progress=progress
    )


def _write_bitsandbytes(parent: _Parent, staging: Path, progress: Progress) -> None:
    bitsandbytes.write(parent.config.model, staging)


def _write_streamed(parent: _Parent, staging: Path, progress: Progress, *, scheme: StreamedScheme) -> None:
    compressed.write(parent.model, staging, scheme=scheme, progress=progress)


def _write_calibrated(parent: _Parent, staging: Path, progress: Progress, *, scheme: calibrated.CalibratedScheme) -> None:
    calibrated.write(parent.config, staging, scheme=scheme, scratch=staging.parent / "scratch", progress=progress)


_WRITERS: dict[Scheme, Callable[[_Parent, Path, Progress], None]] = {
    "unsloth": _write_unsloth,
    "bitsandbytes": _write_bitsandbytes,
    "w8a8": functools.partial(_write_streamed, scheme="w8a8"),
    "w8a16": functools.partial(_write_streamed, scheme="w8a16"),
    "fp8": functools.partial(_write_streamed, scheme="fp8"),
    "gptq": functools.partial(_write_calibrated, scheme="gptq"),
    "smoothquant": functools.partial(_write_calibrated, scheme="smoothquant"),
}


def _try_in_order(parent: _Parent, staging: Path, progress: Progress) -> list[SchemeAttempt]:
    """Every scheme that was tried; the last one is good and lies in ``staging``."""
    attempts: list[SchemeAttempt] = []
    schemes = parent.config.params.schemes
    for index, scheme in enumerate(schemes):
        check_stop()
        shutil.rmtree(staging, ignore_errors=True)
        part = Part(progress, begin=index / len(schemes), end=(index + 1) / len(schemes))
        attempt = _attempt(scheme, parent, staging, part)
        attempts.append(attempt)
        if attempt.ok:
            progress.event(f"{scheme} is kept: {attempt.reason}", scheme=scheme)
            Part(progress).step(1, 1, **_finite(attempt))
            return attempts
        progress.event(f"{scheme} is not taken: {attempt.reason}", level="warn", scheme=scheme)
        part.step(1, 1, **_finite(attempt))
    raise _none_kept(parent.config.params, attempts)


def _attempt(scheme: Scheme, parent: _Parent, staging: Path, progress: Part) -> SchemeAttempt:
    """Write and measure one checkpoint; leaves ``staging`` only if it is good and degrades the model little enough."""
    import torch

    began = time.monotonic()
    try:
        progress.phase(f"quantize with {scheme}")
        _WRITERS[scheme](parent, staging, progress.within(0, 0.5))
        check_stop()
        figures = _figures(scheme, parent, staging, progress) if parent.config.measure else None
    except SchemeUnavailable as unavailable:
        shutil.rmtree(staging, ignore_errors=True)
        return SchemeAttempt(scheme=scheme, ok=False, reason=unavailable.message, seconds=time.monotonic() - began)
    except (MemoryError, torch.OutOfMemoryError) as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise OutOfMemory(f"Out of memory in scheme {scheme}: {error}. Use a machine with more memory.", param="model") from None
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    finally:
        shutil.rmtree(staging.parent / "scratch", ignore_errors=True)
    attempt = _judged(scheme, figures, limit=parent.config.params.max_degradation)
    attempt.bytes, attempt.seconds = weight_bytes(staging), time.monotonic() - began
    if not attempt.ok:
        shutil.rmtree(staging)
    return attempt


def _figures(scheme: Scheme, parent: _Parent, staging: Path, progress: Part) -> Figures:
    expected = parent.measured(progress.within(0.5, 0.75))
    progress.phase(f"check {scheme}")
    return check(expected, staging, parent.held_out, progress=progress.within(0.75, 1))


def _judged(scheme: Scheme, figures: Figures | None, *, limit: float) -> SchemeAttempt:
    if figures is None:
        return SchemeAttempt(scheme=scheme, ok=True, reason=_NOT_MEASURED)
    above = figures.above(limit)
    return SchemeAttempt(
        scheme=scheme,
        ok=not above,
        reason=f"{figures.told}; the limit is {limit:+.2%} (params.max_degradation)" if above else figures.told,
        **{name: value if value is not None and math.isfinite(value) else None for name, value in asdict(figures).items()},
    )


def _none_kept(params: QuantizeParams, attempts: list[SchemeAttempt]) -> InvalidRequest:
    told = "; ".join(f"{attempt.scheme}: {attempt.reason}" for attempt in attempts)
    measured = any(attempt.kl is not None for attempt in attempts)
    within = f" and stay within params.max_degradation ({params.max_degradation:.2%})" if measured else ""
    advice = " Add a scheme (docs/quantization.md says which there are), or raise params.max_degradation if that loss is acceptable."
    message = f"No scheme of params.schemes could run{within}.{advice if measured else ''} {told}"
    return InvalidRequest(message, param="params.schemes", code="no_scheme_ran")


def _finite(attempt: SchemeAttempt) -> dict[str, float]:
    figures = attempt.model_dump(include=set(Figures.__dataclass_fields__))
    return {name: value for name, value in figures.items() if value is not None}


def _publish(parent: _Parent, staging: Path, output: Path, *, attempts: list[SchemeAttempt], started: float) -> QuantizeResult:
    held_out = parent.held_out
    result = QuantizeResult(
        output=output,
        scheme=attempts[-1].scheme,
        merge=parent.merge,
        attempts=attempts,
        held_out_text_tokens=sum(sum(row.counted) for row in held_out.texts),
        held_out_answer_tokens=sum(sum(row.counted) for row in held_out.answers),
        bytes=weight_bytes(staging),
        parent_bytes=weight_bytes(parent.config.model),
        quantized_modules=len(quantized_weights(staging)),
        seconds=time.monotonic() - started,
        peak_memory_bytes=1024 * max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)),
    )
    record = result.model_dump_json(indent=2, exclude=_NOT_RECORDED)
    (staging / RECORD).write_text(record + "\n", encoding="utf-8")
    for path in staging.iterdir():
        path.chmod(0o644)  # safetensors writes 0600, and the model server may run as another user
    fsync_tree(staging)
    os.rename(staging, output)
    return result
