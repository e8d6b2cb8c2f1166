"""The processes of one run: who writes, what they tell each other, and how the player is held by all of them.

One process is the ordinary case and talks to nobody. Several are started by ``torchrun``; each takes its part of every
step's windows, and the wrappers of PyTorch average their gradients.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
import time
from collections.abc import Callable, Iterator
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

STILL_HERE_SECONDS = 60  # of the 30 minutes that Gloo waits for an answer


@dataclass
class Processes:
    """This process among those of the run. Use as a context manager, unless torch.distributed is already started."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0  # among those of this machine: its GPU
    has_started: bool = False  # torch.distributed, and so has to end it
    group: dist.ProcessGroup | None = None  # that values on the host go through; None: the one for everything

    @classmethod
    def of_this_run(cls) -> Processes:
        """As ``torchrun`` says in the environment; one process alone where it says nothing."""
        return cls(*launched_as())

    def __enter__(self) -> Processes:
        if self.count > 1 and not dist.is_initialized():
            # Tensors talk where they are; what is decided on the host needs no device, and does not wait for it.
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            try:
                store, rank, count = next(dist.rendezvous("env://"))
            except ValueError as error:  # what torchrun sets besides
                raise UserError(f"WORLD_SIZE is {self.count} in the environment; {error}; start by torchrun") from error
            dist.init_process_group(backend, store=meet(store, rank, count), rank=rank, world_size=count)
            self.has_started = True
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        # After an error the others may be gone, and waiting for them would hide it.
        if kind is None and self.has_started:
            dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes what one process writes."""
        return self.rank == 0

    def share(self, windows: range) -> range:
        """This process's part of a step's windows.

        Raises:
            UserError: They cannot be divided evenly.
        """
        if len(windows) % self.count:
            raise UserError(
                f"micro_batch_size times gradient_accumulation_steps is {len(windows)}, which {self.count} processes "
                f"cannot share; expected a multiple of {self.count}"
            )
        size = len(windows) // self.count
        return windows[self.rank * size : (self.rank + 1) * size]

    # --- what they tell each other; every process has to ask at the same place ---

    def mean(self, values: Tensor) -> Tensor:
        """The mean over processes of a tensor of any shape, on its device."""
        if self.count > 1:
            values = values.clone()
            dist.all_reduce(values)
            values /= self.count
        return values

    def largest(self, number: int) -> int:
        """The largest of the processes' numbers; no device is waited for."""
        if self.count == 1:
            return number
        numbers = torch.tensor(number)
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=self.group)
        return int(numbers)

    def from_main(self, value: Any) -> Any:
        """The main process's value, in every process."""
        if self.count == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group, device=torch.device("cpu"))
        return values[0]

    def ask_main(self, question: Callable[[], Any]) -> Any:
        """What ``question`` answers in the main process, or the error it raises there, in every process.

        However long it takes: the others hear from the main process meanwhile, or they would take it for lost.
        """
        answer = error = None
        if self.is_main:
            with self._saying_still_here():
                try:
                    answer = question()
                except Exception as raised:
                    error = raised
        while (said := self.from_main((answer, error))) is None:
            pass
        answer, error = said
        if error is not None:
            raise error
        return answer

    @contextmanager
    def _saying_still_here(self) -> Iterator[None]:
        """In the main process, tell the others None now and then."""
        is_over = threading.Event()

        def say() -> None:
            with suppress(RuntimeError):  # that another is gone, the answer will find too
                while not is_over.wait(STILL_HERE_SECONDS):
                    self.from_main(None)

        thread = threading.Thread(target=say, daemon=True)
        if self.count > 1:
            thread.start()
        try:
            yield
        finally:
            is_over.set()
            if self.count > 1:
                thread.join()

    def after_main(self, open_: Callable[[str | None], Any]) -> Any:
        """What ``open_`` opens, in the main process first; in the others it is told the ``digest`` of what that is."""
        opened = []
        verified = self.ask_main(lambda: opened.append(open_(None)) or opened[0].digest)
        return opened[0] if opened else open_(verified)

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, by rank, in every process."""
        if self.count == 1:
            return [value]
        values = [None] * self.count
        dist.all_gather_object(values, value, group=self.group)
        return values

    def apart(self) -> Processes:
        """The same processes for another thread, whose words do not mix with what is said here meanwhile."""
        return replace(self, group=dist.new_group(backend="gloo")) if self.count > 1 else self

    # --- how they hold the player ---

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
    """A part of ``store`` that is used by the processes running now and by none before them.

    torchrun's store outlives a restart, and with it the addresses of processes that are dead; its count of restarts may
    differ between machines. So each process leaves a name that nobody had, the first one announces all names it finds
    as a meeting, again and again, until each process has come to one that has its own name.

    Raises:
        RunFailed: Somebody did not come.
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


def gradients_are_summed_later(model: nn.Module, is_last: bool) -> AbstractContextManager:
    """Around the passes of one micro-batch: only the last one of a step exchanges gradients."""
    model = getattr(model, "_orig_mod", model)  # what torch.compile holds
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(is_last)
    elif isinstance(model, DistributedDataParallel) and not is_last:
        return model.no_sync()
    return nullcontext()


def lost_another(error: BaseException) -> bool:
    """Whether an error says that another process no longer answers."""
    return isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and "gloo" in str(error)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The tensor with the parts of all processes; every process has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
