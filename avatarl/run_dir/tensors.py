"""A run's tensors in files: player, optimisers and snapshot, whole or in the parts that processes hold.

A process writes the rows it holds of each tensor, with the number of the first one, as safetensors; whoever reads takes
the rows it wants from whichever file has them. So a run may go on with another number of processes.
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
from avatarl.training.optim import KEPT, Optimisers, kept_by
from avatarl.training.processes import local
from avatarl.training.rewarded_player import RewardedPlayer

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
        return cls(local(tensor.detach()), first_row(tensor), tuple(tensor.shape))

    def copy(self) -> Held:
        """In host memory, for who writes it later."""
        return self._replace(rows=self.rows.to("cpu", copy=True))


def run_state(model: RewardedPlayer, optimisers: Optimisers) -> dict[str, dict[str, Held]]:
    """Every tensor that a run goes on from, by file and name; the run's own memory, not copies."""
    parts = {"player": tensors_of_model(model.player), "optimiser": optimiser_tensors(model.player, optimisers)}
    parts |= {"snapshot": tensors_of_model(model.snapshot.model)} if model.snapshot else {}
    started = [(number, average) for number, average in enumerate(model.averages) if average.has_started]
    parts |= {f"average{number}": tensors_of_model(average.model) for number, average in started}
    return {part: {name: Held.of(tensor) for name, tensor in named.items()} for part, named in parts.items()}


def tensors_of_model(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers by name, a shared one once."""
    found, seen = {}, set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            found[name] = tensor
            seen.add(id(tensor))
    return found


def optimiser_tensors(player: nn.Module, optimisers: Optimisers) -> dict[str, Tensor]:
    """The state that optimisers keep for each parameter, as ``PARAMETER.KIND``; a parameter has one optimiser."""
    names = {id(parameter): name for name, parameter in player.named_parameters()}
    return {
        f"{names[id(parameter)]}.{kind}": value
        for optimiser in optimisers.optimisers
        for parameter, state in optimiser.state.items()
        for kind, value in state.items()
    }


def load_player(files: Iterable[Path], player: nn.Module) -> None:
    """Put back the player's tensors alone.

    Raises:
        UserError: The files hold tensors of another model.
    """
    _copy_into(tensors_of_model(player), SavedTensors(_by_part(files).get("player", [])))


def load_run(files: Sequence[Path], model: RewardedPlayer, optimisers: Optimisers) -> None:
    """Put back what :func:`run_state` gave.

    An optimiser that keeps other things than were saved starts anew, and so does a snapshot that was not saved: the run
    was started with others.

    Raises:
        UserError: The files hold tensors of another model.
    """
    saved = _by_part(files)
    load_player(files, model.player)
    if model.snapshot and "snapshot" in saved:
        _copy_into(tensors_of_model(model.snapshot.model), SavedTensors(saved["snapshot"]))
    elif model.snapshot:
        model.refresh_snapshot()
    for number, average in enumerate(model.averages):
        average.has_started = f"average{number}" in saved
        if average.has_started:
            _copy_into(tensors_of_model(average.model), SavedTensors(saved[f"average{number}"]))
    kept = SavedTensors(saved.get("optimiser", []))
    names = {id(parameter): name for name, parameter in model.player.named_parameters()}
    for optimiser in optimisers.optimisers:
        for parameter in (parameter for group in optimiser.param_groups for parameter in group["params"]):
            owner = names[id(parameter)]
            kinds = {name.rpartition(".")[2] for name in kept.names_of(owner)}
            if kinds and kinds not in KEPT.values():
                raise UserError(f"the checkpoint is not what a run writes: it keeps {sorted(kinds)} of {owner}")
            if kinds == kept_by(optimiser):
                optimiser.state[parameter] = {kind: kept.read(f"{owner}.{kind}", parameter) for kind in sorted(kinds)}


def save_part(path: Path, held: Mapping[str, Held]) -> None:
    """Write what this process holds of some tensors, as safetensors."""
    held = dict(sorted(held.items()))  # optimisers keep theirs in an order that a resumed run need not find again
    described = json.dumps({name: [part.first_row, part.shape] for name, part in held.items()})
    save_file({name: part.rows.contiguous() for name, part in held.items()}, path, {HELD: described})


def first_row(tensor: Tensor) -> int:
    """The number of the first row that this process holds of a tensor."""
    if not isinstance(tensor, DTensor) or not tensor.placements[0].is_shard():
        return 0
    size = -(-tensor.shape[0] // tensor.device_mesh.size())  # as FSDP2 divides: parts of equal size, the last shorter
    return min(size * tensor.device_mesh.get_local_rank(), tensor.shape[0])


class SavedTensors:
    """The tensors of one part, wherever their rows lie.

    Raises:
        UserError: The files do not hold each row of a tensor once, or each of them all rows.
    """

    def __init__(self, files: Iterable[Path]):
        self._places: dict[str, list[tuple[int, Path]]] = {}
        self._shapes: dict[str, torch.Size] = {}
        pieces_of: dict[str, list[tuple[int, list[int]]]] = {}  # first row and shape of each piece
        for path in files:
            with safe_open(path, "pt") as file:
                held = json.loads(file.metadata()[HELD])
                if held.keys() != set(file.keys()):
                    raise UserError(f"{path} is not what a run writes: it holds other tensors than it says")
                for name, (row, shape) in held.items():
                    self._places.setdefault(name, []).append((row, path))
                    if self._shapes.setdefault(name, torch.Size(shape)) != torch.Size(shape):
                        raise UserError(f"{path} is not what a run writes: {name} has another shape in another file")
                    pieces_of.setdefault(name, []).append((row, file.get_slice(name).get_shape()))
        for name, pieces in pieces_of.items():
            if not _is_whole(self._shapes[name], pieces):
                found = ", ".join(f"{shape} from row {row}" for row, shape in pieces)
                raise UserError(
                    f"the checkpoint is not what a run writes: {name} has shape {tuple(self._shapes[name])} and lies "
                    f"there as {found}"
                )

    @property
    def names(self) -> list[str]:
        return list(self._places)

    def names_of(self, owner: str) -> list[str]:
        """Those of the form ``OWNER.KIND``."""
        return [name for name in self._places if name.rpartition(".")[0] == owner]

    def shape(self, name: str) -> torch.Size:
        """Of the whole tensor."""
        return self._shapes[name]

    def read(self, name: str, parameter: Tensor) -> Tensor:
        """A new tensor on the device of ``parameter``, divided as that is where it has the same shape.

        Raises:
            UserError: It is neither one number nor of the parameter's shape, or holds numbers that no run keeps.
        """
        if self.shape(name) == parameter.shape:
            value = torch.empty_like(parameter.detach())
        elif name.endswith(".step") and not self.shape(name):
            value = torch.empty((), device=parameter.device)
        else:
            raise UserError(f"the checkpoint is of another model: {name} has shape {tuple(self.shape(name))} there")
        self.read_into(value, name)
        return value

    def read_into(self, target: Tensor, name: str) -> None:
        """Fill the rows that this process holds of ``target``.

        Raises:
            UserError: They are of another dtype, not finite, or negative where they cannot be.
        """
        rows, begin = local(target), first_row(target)
        for row, path in self._places[name]:
            with safe_open(path, "pt") as file:
                if rows.dim() == 0:
                    rows.copy_(_checked(file.get_tensor(name), rows, name))
                    return
                saved = file.get_slice(name)
                first, last = max(begin, row), min(begin + len(rows), row + saved.get_shape()[0])
                if first < last:
                    rows[first - begin : last - begin].copy_(_checked(saved[first - row : last - row], rows, name))


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
    """``saved``, in host memory, if it is what a run may hold in ``target``."""
    if saved.dtype != target.dtype:
        found = f"is {saved.dtype}, where {target.dtype} is expected"
    elif not saved.isfinite().all():
        found = "holds numbers that are not finite"
    elif name.endswith(NEVER_NEGATIVE) and (saved < 0).any():
        found = "holds negative numbers"
    else:
        return saved
    raise UserError(f"the checkpoint is not what a run writes: {name} {found}")


def _copy_into(targets: Mapping[str, Tensor], saved: SavedTensors) -> None:
    wanted = {name: tuple(tensor.shape) for name, tensor in targets.items()}
    found = {name: tuple(saved.shape(name)) for name in saved.names}
    if wanted != found:
        name = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))[0]
        raise UserError(
            f"the checkpoint is of another model: {name} has shape {found.get(name)} there and {wanted.get(name)} here"
        )
    with torch.no_grad():
        for name, target in targets.items():
            saved.read_into(target, name)


def _by_part(files: Iterable[Path]) -> dict[str, list[Path]]:
    """``player.safetensors`` or ``player-00001-of-00002.safetensors`` … as ``{"player": [paths]}``."""
    parts: dict[str, list[Path]] = {}
    for path in sorted(files):
        if path.suffix == ".safetensors":
            parts.setdefault(path.stem.partition("-")[0], []).append(path)
    return parts
