"""A model whose weights lie in shards on several GPUs (FSDP2, ``torch.distributed.fsdp.fully_shard``), and what is whole outside of it.

Everything here leaves a model alone that lies in one piece, so that the same lines train on one GPU and on several. Sharded tensors
are ``DTensor``; what reads or writes one whole must run on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from trainer.ranks import Group

_SHARDED_OPTIMIZERS = {"paged_adamw_32bit": "adamw_torch", "paged_adamw_8bit": "adamw_torch", "adamw_8bit": "adamw_torch"}


def optimizer_for_shards(name: str) -> str:
    """The optimizer in place of ``name``: the kernels of bitsandbytes know no shards, and each rank has a part of the state only."""
    return _SHARDED_OPTIMIZERS.get(name, name)


def shard(model: Any, *, group: Group, device: torch.device) -> None:
    """Spread the weights over the ranks: each layer is put together for its own pass, what lies around the layers for the whole step.

    The model may lie in the machine's memory: a layer comes to the GPU as its shard. Gradients are added up over the ranks and
    not averaged, since the loss of a micro-batch is divided by the tokens of all of them already.
    """
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(device.type, (group.size,))
    for layer in layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for part in _parts(model):
        part.set_force_sum_reduction_for_comms(True)
        part.set_gradient_divide_factor(1.0)


def layers(model: Any) -> list[torch.nn.Module]:
    """The decoder layers, by the name of their class that transformers gives as not to be split over devices."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = set(base._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]


@contextmanager
def exchanging(model: Any, wanted: bool) -> Iterator[None]:
    """A backward pass whose gradients are added up over the ranks, or are kept for a later one."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(wanted)
    yield


def settle(model: Any) -> None:
    """Let the parameters be the shards, which the optimizer holds: after a pass without gradients some are whole copies."""
    for part in _parts(model):
        part.reshard()


def whole(tensor: Any) -> Any:
    """A tensor in one piece, on the device where its shard lies."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A whole tensor as ``parameter`` lies: on its device, and of a sharded one this rank's part."""
    moved = tensor.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return moved
    return distribute_tensor(moved, parameter.device_mesh, parameter.placements, src_data_rank=None)


def on_cpu(tensor: torch.Tensor, *, keep: bool) -> torch.Tensor | None:
    """A copy in one piece in the machine's memory; None without ``keep``: such a rank only gives its part."""
    found = whole(tensor.detach())
    return found.to("cpu").contiguous().clone() if keep else None


def whole_state(state: dict[str, Any], *, keep: bool) -> dict[str, Any]:
    """``state_dict()`` of an optimizer with every sharded tensor as :func:`on_cpu` has it."""
    found = {
        index: {name: on_cpu(value, keep=keep) if isinstance(value, DTensor) else value for name, value in tensors.items()}
        for index, tensors in state["state"].items()
    }
    return {**state, "state": found}


def spread_state(state: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    """The inverse of :func:`whole_state`, for ``optimizer.load_state_dict``."""
    indices = [index for saved in state["param_groups"] for index in saved["params"]]
    parameters = dict(zip(indices, (p for held in optimizer.param_groups for p in held["params"]), strict=True))
    found = {
        index: {
            name: like(value, parameters[index]) if _has_shape_of(value, parameters[index]) else value for name, value in tensors.items()
        }
        for index, tensors in state["state"].items()
    }
    return {**state, "state": found}


def put_together(model: Any, *, keep: bool) -> None:
    """With ``keep``, make every trained parameter of a sharded model whole and ordinary: it is to be read then and not to be run."""
    settle(model)
    for name, parameter in list(model.named_parameters()):
        if parameter.requires_grad and isinstance(parameter, DTensor):
            owner, _, leaf = name.rpartition(".")
            if (found := on_cpu(parameter, keep=keep)) is not None:
                model.get_submodule(owner)._parameters[leaf] = torch.nn.Parameter(found)


def _parts(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _has_shape_of(value: Any, parameter: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and isinstance(parameter, DTensor) and value.shape == parameter.shape
