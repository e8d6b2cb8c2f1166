"""The processes of one run: how they communicate, and how they hold the player.

One process is the ordinary case. ``torchrun`` starts several; each takes its share of every step's windows, and
PyTorch's wrappers average their gradients.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from avatarl.device import launched_as
from avatarl.errors import RunFailed, UserError

HEARTBEAT_SECONDS = 60  # Gloo waits 30 minutes for an answer


@dataclass
class Processes:
    """This process among those of the run. Use as a context manager, unless torch.distributed has been initialised."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0  # among those of this machine: its GPU
    has_started: bool = False  # whether this object initialised torch.distributed, and so ends it
    group: dist.ProcessGroup | None = None  # for values on the host; None: the default group

    @classmethod
    def of_this_run(cls) -> Processes:
        """From the environment that ``torchrun`` sets; one process alone without it."""
        return cls(*launched_as())

    def __enter__(self) -> Processes:
        if self.count > 1 and not dist.is_initialized():
            # Values on the host are exchanged by Gloo, so that they do not wait for a device.
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            try:
                store, rank, count = next(dist.rendezvous("env://"))
            except ValueError as error:  # the other variables that torchrun sets
                raise UserError(f"WORLD_SIZE is {self.count} in the environment; {error}; start by torchrun") from error
            dist.init_process_group(backend, store=meet(store, rank, count), rank=rank, world_size=count)
            self.has_started = True
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        # After an error other processes may be gone, and waiting for them would hide the error.
        if kind is None and self.has_started:
            dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        """Whether this process writes what only one process writes."""
        return self.rank == 0

    # --- communication; every process has to call the same methods in the same order ---

    def mean(self, values: Tensor) -> Tensor:
        """The mean over processes of a tensor of any shape, on its device."""
        if self.count > 1:
            values = values.clone()
            dist.all_reduce(values)
            values /= self.count
        return values

    def means(self, values: Mapping[str, Tensor | float]) -> dict[str, float]:
        """The mean over processes of each value (), in float64; waits for the device."""
        if not values:
            return {}
        device = next((value.device for value in values.values() if isinstance(value, Tensor)), None)
        stacked = torch.stack([torch.as_tensor(x, dtype=torch.float64, device=device) for x in values.values()])
        return dict(zip(values, self.mean(stacked).tolist(), strict=True))

    def largest(self, number: int) -> int:
        """The largest of the processes' numbers, without waiting for a device."""
        if self.count == 1:
            return number
        numbers = torch.tensor(number)
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=self.group)
        return int(numbers)

    def broadcast(self, value: Any) -> Any:
        """The main process's value, in every process."""
        if self.count == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group, device=torch.device("cpu"))
        return values[0]

    def on_main(self, function: Callable[[], Any]) -> Any:
        """Call ``function`` in the main process; every process returns its result or raises its error.

        It may take long: heartbeats keep the other processes from timing out.
        """
        result = error = None
        if self.is_main:
            with self._heartbeat():
                try:
                    result = function()
                except Exception as raised:
                    error = raised
        while (received := self.broadcast((result, error))) is None:
            pass
        result, error = received
        if error is not None:
            raise error
        return result

    @contextmanager
    def _heartbeat(self) -> Iterator[None]:
        """In the main process, broadcast None now and then."""
        is_over = threading.Event()

        def beat() -> None:
            with suppress(RuntimeError):  # another process is gone; the result's broadcast finds that too
                while not is_over.wait(HEARTBEAT_SECONDS):
                    self.broadcast(None)

        thread = threading.Thread(target=beat, daemon=True)
        if self.count > 1:
            thread.start()
        try:
            yield
        finally:
            is_over.set()
            if self.count > 1:
                thread.join()

    def main_first(self, open_: Callable[[str | None], Any]) -> Any:
        """Call ``open_(None)`` in the main process, then ``open_(digest)`` of what it opened in the others."""
        opened = []
        verified = self.on_main(lambda: opened.append(open_(None)) or opened[0].digest)
        return opened[0] if opened else open_(verified)

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, by rank, in every process."""
        if self.count == 1:
            return [value]
        values = [None] * self.count
        dist.all_gather_object(values, value, group=self.group)
        return values

    def for_another_thread(self) -> Processes:
        """The same processes for another thread, with a group of its own, so that messages do not mix."""
        return replace(self, group=dist.new_group(backend="gloo")) if self.count > 1 else self

    # --- holding the player ---

    def wrap(self, model: nn.Module, parallel: str, device: torch.device) -> nn.Module:
        """The module to call in training, after :meth:`shard` for ``fsdp``; gradients become means over processes."""
        if self.count == 1 or parallel == "fsdp":
            return model
        return DistributedDataParallel(
            model,
            device_ids=[device.index] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
        )

    def shard(self, root: nn.Module, model: PreTrainedModel, device: torch.device, keep_root: bool = False) -> None:
        """Divide the weights of ``root``, which calls ``model``, among the processes (FSDP2), in place.

        The decoder layers and the root are one group each, so that inside the root's forward the head is a plain
        tensor. ``keep_root`` leaves the root's own weights (embedding, norm, head) whole after a forward pass, where
        they are read after it.
        """
        mesh = dist.init_device_mesh(device.type, (self.count,))
        blocks = set(model._no_split_modules or ())
        for module in model.modules():
            if type(module).__name__ in blocks:
                fully_shard(module, mesh=mesh)
        fully_shard(root, mesh=mesh, reshard_after_forward=False if keep_root else None)


def meet(store: dist.Store, rank: int, count: int, patience_seconds: float = 600) -> dist.Store:
    """A part of ``store`` for the processes that run now, and none before them.

    torchrun's store outlives a restart, and with it the addresses of dead processes; its count of restarts may differ
    between machines. So each process leaves a fresh name, and the first one repeatedly announces all names it finds as
    a meeting, until each process has joined one with its own name.

    Raises:
        RunFailed: A process did not join in time.
    """
    name, until = secrets.token_hex(8), time.monotonic() + patience_seconds
    store.set(f"name/{rank}", name)
    while time.monotonic() < until:
        if rank == 0:
            found = [f"name/{other}" for other in range(count)]
            store.set("meeting", ",".join(store.get(key).decode() if store.check([key]) else "" for key in found))
        meeting = store.get("meeting").decode() if store.check(["meeting"]) else ""
        if name in meeting.split(","):
            here = dist.PrefixStore(hashlib.sha256(meeting.encode()).hexdigest(), store)
            here.set(f"came/{rank}", "")
            if here.check([f"came/{other}" for other in range(count)]):
                return here
        time.sleep(0.05)
    raise RunFailed(f"process {rank} of {count} waited {patience_seconds:.0f} seconds for the others")


def sync_gradients(model: nn.Module, is_last: bool) -> AbstractContextManager:
    """Around the passes of one micro-batch: exchange gradients only after the last one of a step."""
    model = getattr(model, "_orig_mod", model)  # inside torch.compile
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(is_last)
    elif isinstance(model, DistributedDataParallel) and not is_last:
        return model.no_sync()
    return nullcontext()


def is_lost_process(error: BaseException) -> bool:
    """Whether an error means that another process no longer answers."""
    return isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and "gloo" in str(error)


def whole(tensor: Tensor) -> Tensor:
    """The tensor with the shards of all processes; every process has to call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
