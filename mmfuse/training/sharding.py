"""FSDP 2: weights, gradients and states of the optimizer are split over all ranks, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import torch
from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    StrategyRegistry,
)
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim import Optimizer

from mmfuse.errors import ConfigError
from mmfuse.models import MultimodalLM
from mmfuse.training.checkpoints import LAST, PREVIOUS, read_checkpoint
from mmfuse.training.sharded_files import OPTIMIZER, WEIGHT, cut_like, fill, load_tensors, read_table, save_sharded

NAME: Final = "fsdp2"


class ShardedStrategy(ModelParallelStrategy):
    """torch's `fully_shard` over all ranks, with checkpoints of which each rank writes its part.

    Each layer of the decoder and each encoder is gathered where it runs, and everything else once for a whole pass.
    Batches are dealt to ranks as under DDP, and the losses are the same.

    Args:
        timeout: after which a rank that waits for another one fails.
        process_group_backend: by default NCCL on GPUs and gloo on CPUs.
    """

    def __init__(
        self, timeout: timedelta | None = default_pg_timeout, process_group_backend: str | None = None
    ) -> None:
        super().__init__(tensor_parallel_size=1, timeout=timeout, process_group_backend=process_group_backend)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    # Checkpoints

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """States by the names of parameters, which do not depend on their order and number in the optimizer."""
        names = self._names()
        groups = [
            {**group, "params": [names[parameter] for parameter in group["params"]]} for group in optimizer.param_groups
        ]
        return {"state": {names[one]: dict(state) for one, state in optimizer.state.items()}, "param_groups": groups}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        target = Path(self.broadcast(str(filepath)))
        state = dict(checkpoint)
        tensors = {WEIGHT + name: tensor for name, tensor in state.pop("state_dict").items()}
        (optimizer,) = state.pop("optimizer_states")
        for name, kept in optimizer["state"].items():
            tensors |= {f"{OPTIMIZER}{name}/{key}": value for key, value in kept.items()}
        state["optimizer_groups"] = optimizer["param_groups"]
        save_sharded(tensors, state, target, target.with_stem(PREVIOUS) if target.stem == LAST else None)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load weights and optimizer in place, and return the rest; from a sharded checkpoint, or a file of DDP."""
        path = Path(self.broadcast(str(checkpoint_path)))
        if path.is_dir():
            return self._load_sharded(path)
        return self._load_whole(path)

    def _load_sharded(self, folder: Path) -> dict[str, Any]:
        state = read_checkpoint(folder, map_location="cpu")
        held = read_table(folder)["tensors"]
        assert self.model is not None
        tensors: dict[str, Tensor] = {WEIGHT + name: one.detach() for name, one in self.model.state_dict().items()}
        for optimizer in self.optimizers:
            self._restore_groups(optimizer, state["optimizer_groups"], f"{folder}")
            for name, parameter in self._parameters(optimizer).items():
                optimizer.state[parameter] = {}
                start = f"{OPTIMIZER}{name}/"
                for key in (one for one in held if one.startswith(start)):
                    value = _empty_like(parameter, held[key]["size"], getattr(torch, held[key]["dtype"]))
                    optimizer.state[parameter][key.removeprefix(start)] = tensors[key] = value
        load_tensors(tensors, folder)
        return state

    def _load_whole(self, path: Path) -> dict[str, Any]:
        state = read_checkpoint(path, map_location="cpu", mmap=True)
        assert self.model is not None
        fill(self.model.state_dict(), state.pop("state_dict"), path)
        for optimizer, saved in zip(self.optimizers, state.pop("optimizer_states"), strict=False):
            # A whole optimizer counts its parameters through, group by group.
            parameters = self._parameters(optimizer)
            names = dict(enumerate(parameters))
            groups = [
                {**one, "params": [names.get(number) for number in one["params"]]} for one in saved["param_groups"]
            ]
            self._restore_groups(optimizer, groups, f"{path}")
            for number, kept in saved["state"].items():
                parameter = parameters[names[number]]
                optimizer.state[parameter] = {key: cut_like(parameter, value) for key, value in kept.items()}
        return state

    def _restore_groups(self, optimizer: Optimizer, saved: Sequence[Mapping[str, Any]], where: str) -> None:
        names = self._names()
        own = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
        if own != [list(group["params"]) for group in saved]:
            raise ConfigError(f"{where}: the optimizer there tunes other parameters; restore the stages")
        for group, before in zip(optimizer.param_groups, saved, strict=True):
            group.update({key: value for key, value in before.items() if key != "params"})

    def _names(self) -> dict[Tensor, str]:
        assert self.lightning_module is not None
        return {parameter: name for name, parameter in self.lightning_module.named_parameters()}

    def _parameters(self, optimizer: Optimizer) -> dict[str, Tensor]:
        names = self._names()
        return {names[parameter]: parameter for group in optimizer.param_groups for parameter in group["params"]}


def _empty_like(parameter: Tensor, size: list[int], dtype: torch.dtype) -> Tensor:
    """Room for a saved state of `parameter`: cut like it if it has its size, else a number or so on the CPU."""
    if list(parameter.size()) == size:
        return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
    return torch.zeros(size, dtype=dtype)


def shard_network(network: MultimodalLM, mesh: DeviceMesh) -> None:
    """Cut the parameters of a network over the ranks of a one-dimensional mesh; once, before its optimizer is made."""
    if isinstance(network, FSDPModule):
        return
    base = network.decoder.model
    for unit in (*base.layers, *network.encoders.values()):
        if any(True for _ in unit.parameters()):
            fully_shard(unit, mesh=mesh)
    fully_shard(network, mesh=mesh)


def whole_weights(network: MultimodalLM) -> dict[str, Tensor]:
    """The weights of a sharded network on the CPU of rank 0; nothing on the others. All ranks call it together."""
    whole = get_model_state_dict(network, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return {name: value for name, value in whole.items() if isinstance(value, Tensor)}


def register() -> None:
    """Give `trainer.strategy` the name `fsdp2`, as Lightning's own strategies have theirs."""
    if NAME not in StrategyRegistry:
        StrategyRegistry.register(NAME, ShardedStrategy, description="FSDP 2, with checkpoints of DCP")


def refuse_other_sharding(strategy: Any) -> None:
    """Raise `ConfigError` for strategies of Lightning whose checkpoints would not be safe.

    Args:
        strategy: the value of `trainer.strategy`.
    """
    kind = StrategyRegistry[strategy]["strategy"] if strategy in StrategyRegistry else type(strategy)
    if issubclass(kind, FSDPStrategy | ModelParallelStrategy | DeepSpeedStrategy) and kind is not ShardedStrategy:
        name = strategy if isinstance(strategy, str) else kind.__name__
        raise ConfigError(
            f"trainer.strategy {name} writes its checkpoints in place, so that a kill destroys the only one, and was "
            f"never tried here; use {NAME}, which shards as FSDP does"
        )


def is_fsdp2(strategy: Any) -> bool:
    """Whether a value of `trainer.strategy` means `ShardedStrategy`."""
    return strategy == NAME or isinstance(strategy, ShardedStrategy)
