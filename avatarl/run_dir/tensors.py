"""Tensors by name in safetensors files, whole or in the parts that processes hold.

Each process writes the rows it holds of each tensor, with the number of the first row. A reader takes the rows it needs
from whichever files have them, so a run can resume with another number of processes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from avatarl.errors import UserError

# The one key of a file's own metadata: ``{name: [first row, shape of the whole]}`` as JSON. (safetensors writes several
# keys in an order that changes, and the same state should be the same bytes.)
HELD = "held"
# Optimiser state that is never negative: a count of steps, and a mean of squares.
NEVER_NEGATIVE = (".step", ".exp_avg_sq")


class Held(NamedTuple):
    """What this process holds of a tensor."""

    rows: Tensor
    first_row: int
    shape: tuple[int, ...]  # of the whole

    @classmethod
    def of(cls, tensor: Tensor) -> Held:
        """A view of a tensor, not a copy; of a DTensor, this process's shard."""
        tensor, first_row = tensor.detach(), 0
        if not isinstance(tensor, DTensor):
            return cls(tensor, first_row, tuple(tensor.shape))
        if tensor.placements[0].is_shard():
            # FSDP2 cuts shards of equal size; the last ones may be shorter.
            size = -(-tensor.shape[0] // tensor.device_mesh.size())
            first_row = min(size * tensor.device_mesh.get_local_rank(), tensor.shape[0])
        return cls(tensor.to_local(), first_row, tuple(tensor.shape))

    def copy(self) -> Held:
        """A copy in host memory, to be written later."""
        return self._replace(rows=self.rows.to("cpu", copy=True))


def tensors_of_model(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers by name, a shared one once."""
    found, seen = {}, set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            found[name] = tensor
            seen.add(id(tensor))
    return found


def load_player(files: Iterable[Path], player: nn.Module) -> None:
    """Load the player's weights from the files of a checkpoint.

    Raises:
        UserError: The files hold tensors of another model.
    """
    SavedTensors(files_by_part(files).get("player", [])).copy_into(tensors_of_model(player))


def save_part(path: Path, held: Mapping[str, Held]) -> None:
    """Write what this process holds of some tensors, as safetensors."""
    held = dict(sorted(held.items()))  # optimisers keep theirs in an order that differs after a resume
    described = json.dumps({name: [part.first_row, part.shape] for name, part in held.items()})
    save_file({name: part.rows.contiguous() for name, part in held.items()}, path, {HELD: described})


def files_by_part(files: Iterable[Path]) -> dict[str, list[Path]]:
    """``player.safetensors`` or ``player-00001-of-00002.safetensors`` … as ``{"player": [paths]}``."""
    parts: dict[str, list[Path]] = {}
    for path in sorted(files):
        if path.suffix == ".safetensors":
            parts.setdefault(path.stem.partition("-")[0], []).append(path)
    return parts


class SavedTensors:
    """The tensors of one part of a checkpoint, wherever their rows lie.

    Raises:
        UserError: The files do not hold each row of a tensor once, or each of them all rows.
    """

    def __init__(self, files: Iterable[Path]):
        self._places: dict[str, list[tuple[int, Path]]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}  # of the whole tensors
        pieces_of: dict[str, list[tuple[int, list[int]]]] = {}  # first row and shape of each piece
        for path in files:
            with safe_open(path, "pt") as file:
                held = json.loads(file.metadata()[HELD])
                if held.keys() != set(file.keys()):
                    raise UserError(f"{path} is not valid: its header lists other tensors than it holds")
                for name, (row, shape) in held.items():
                    self._places.setdefault(name, []).append((row, path))
                    if self.shapes.setdefault(name, tuple(shape)) != tuple(shape):
                        raise UserError(f"{path} is not valid: {name} has another shape in another file")
                    pieces_of.setdefault(name, []).append((row, file.get_slice(name).get_shape()))
        for name, pieces in pieces_of.items():
            if not _is_whole(self.shapes[name], pieces):
                found = ", ".join(f"{shape} from row {row}" for row, shape in pieces)
                raise UserError(
                    f"the checkpoint is not valid: {name} has shape {self.shapes[name]}, but its pieces are {found}"
                )

    def kinds_of(self, parameter: str) -> list[str]:
        """The kinds of optimiser state, of names ``PARAMETER.KIND``, sorted."""
        names = [name.rpartition(".") for name in self.shapes]
        return sorted(kind for owner, _, kind in names if owner == parameter)

    def read_like(self, parameter: Tensor, name: str) -> Tensor:
        """A new tensor on the device of ``parameter``, divided like it if it has the same shape.

        Raises:
            UserError: It is neither one number nor of the parameter's shape, or holds values that no run saves.
        """
        if self.shapes[name] == parameter.shape:
            value = torch.empty_like(parameter.detach())
        elif name.endswith(".step") and not self.shapes[name]:
            value = torch.empty((), device=parameter.device)
        else:
            raise UserError(f"the checkpoint is of another model: {name} has shape {self.shapes[name]} there")
        self.read_into(value, name)
        return value

    def read_into(self, target: Tensor, name: str) -> None:
        """Fill the rows that this process holds of ``target``.

        Raises:
            UserError: They are of another dtype, not finite, or negative where they cannot be.
        """
        rows, begin, _ = Held.of(target)
        for row, path in self._places[name]:
            with safe_open(path, "pt") as file:
                if rows.dim() == 0:
                    rows.copy_(_checked(file.get_tensor(name), rows, name))
                    return
                saved = file.get_slice(name)
                first, last = max(begin, row), min(begin + len(rows), row + saved.get_shape()[0])
                if first < last:
                    rows[first - begin : last - begin].copy_(_checked(saved[first - row : last - row], rows, name))

    @torch.no_grad()
    def copy_into(self, targets: Mapping[str, Tensor]) -> None:
        """Fill every tensor of a model.

        Raises:
            UserError: The names or shapes are those of another model.
        """
        wanted = {name: tuple(tensor.shape) for name, tensor in targets.items()}
        if wanted != self.shapes:
            every = sorted(wanted.keys() | self.shapes.keys())
            name = next(name for name in every if wanted.get(name) != self.shapes.get(name))
            raise UserError(
                f"the checkpoint is of another model: {name} has shape {self.shapes.get(name)} there and "
                f"{wanted.get(name)} here"
            )
        for name, target in targets.items():
            self.read_into(target, name)


def _is_whole(shape: Sequence[int], pieces: Sequence[tuple[int, Sequence[int]]]) -> bool:
    """Whether pieces (first row, shape) are a tensor: divided by rows, or each of them all of it."""
    if all(row == 0 and list(of_piece) == list(shape) for row, of_piece in pieces):
        return True
    if not shape or any(not of_piece or list(of_piece[1:]) != list(shape[1:]) for _, of_piece in pieces):
        return False
    end = 0
    for row, (count, *_) in sorted(pieces):
        if row != end:
            return False
        end += count
    return end == shape[0]


def _checked(saved: Tensor, target: Tensor, name: str) -> Tensor:
    """``saved``, in host memory, if a run may hold it in ``target``."""
    if saved.dtype != target.dtype:
        found = f"has dtype {saved.dtype}; expected {target.dtype}"
    elif not saved.isfinite().all():
        found = "has values that are not finite"
    elif name.endswith(NEVER_NEGATIVE) and (saved < 0).any():
        found = "has negative values"
    else:
        return saved
    raise UserError(f"the checkpoint is not valid: {name} {found}")
