"""The objectives inside ``transformers.Trainer``, for those who live there (docs/integrations.md)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from accelerate.data_loader import BatchSamplerShard, DataLoaderDispatcher, IterableDatasetShard
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments, default_data_collator
from transformers.trainer_utils import EvalLoopOutput

from avatarl.data import PreparedData, Windows
from avatarl.errors import UserError
from avatarl.models import Critic, CriticCache, open_critic
from avatarl.models.loading import check_loss, check_model, check_rows, head_weight
from avatarl.objective import (
    OBJECTIVES,
    AvataRLConfig,
    BaselineConfig,
    Objective,
    linear_objective_loss,
    make_objective,
)
from avatarl.objective.config import require_choice
from avatarl.untrusted import refusing

from .batch import IGNORED, SPLITS, answers_of, count_valid, labels_of, last_hidden_of, name_of, reads_of, targets_of

if TYPE_CHECKING:
    from accelerate import Accelerator

CriticLike = PreTrainedModel | CriticCache | str | Path


class PreparedWindows(Dataset):
    """The windows of a prepared folder as Trainer reads them; two neighbours share a token, which the first predicts.

    An item holds ``input_ids`` and ``labels``, the same (block_size + 1,) int64, and ``window``, (2,) int64, the number
    of the split and of the window in it.
    """

    def __init__(self, data: PreparedData, split: str, block_size: int):
        """Cut a split, ``train`` or ``valid``, into windows of ``block_size`` predictions.

        Raises:
            UserError: There is no such split, or it is too short for one window.
        """
        require_choice("split", split, SPLITS)
        self.split = split
        self.windows = Windows(data.train if split == "train" else data.valid, block_size)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        inputs, targets = self.windows.batch([index])
        tokens = torch.cat([inputs[0], targets[0, -1:]])
        return {"input_ids": tokens, "labels": tokens, "window": torch.tensor([SPLITS.index(self.split), index])}


class Judged(NamedTuple):
    """What a batch came to."""

    loss: Tensor  # ()
    metrics: dict[str, Tensor]  # () each
    counted: Tensor  # (), positions that are not ignored


class AvataRLTrainer(Trainer):
    """Trainer with the loss of any objective but ``ppo``, computed from hidden states; all else is Trainer's own.

    A batch holds ``input_ids`` and ``labels`` (B, T), the same tokens, shifted here, with −100 for what is not to be
    predicted; the last token is predicted and not read. What else there is (``attention_mask``, …) is given to player
    and critics, without the last token where it has an entry for each. The loss is divided by the positions that count
    in the whole optimiser step, over all micro-batches and processes.

    Logs have the objective's metrics (docs/metrics.md) as means over the steps since the last line, ``evaluate()`` has
    them as ``eval_…`` and means over positions. Draws of sampled objectives depend on seed, step and process.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: TrainingArguments | None = None,
        data_collator: Callable | None = None,
        *,
        critics: CriticLike | Sequence[CriticLike] | None = None,
        objective: str | Objective = "avatarl",
        avatarl: AvataRLConfig | None = None,
        baseline: BaselineConfig | None = None,
        **kwargs,
    ):
        """
        Args:
            model, args, data_collator, kwargs: Trainer's. ``processing_class``, the tokenizer that all models share,
                is asked for; without a collator, batches are stacked and not padded.
            critics: Names, as :func:`avatarl.models.load_critic` takes them, what it returns, or, with
                :class:`PreparedWindows` to train on, caches. An objective that needs none leaves them alone.
            objective: What is minimised: a name, or an objective with its settings.
            avatarl: Settings of the rewards and the AvataRL loss.
            baseline: Settings of the other objectives.

        Raises:
            UserError: An argument is missing or would have no effect, or a critic cannot be used.
        """
        # Trainer's own default for a tokenizer pads `input_ids` and not `labels`.
        super().__init__(model, args, data_collator or default_data_collator, **kwargs)
        self._refuse_what_has_no_effect()
        self.objective = objective
        if isinstance(objective, str):
            self.objective = make_objective(objective, avatarl, baseline)
        elif avatarl or baseline:
            raise UserError(f"objective {objective.name!r} brings its settings; expected no avatarl and no baseline")
        if self.objective.needs_snapshot:
            others = ", ".join(name for name, kind in sorted(OBJECTIVES.items()) if not kind.needs_snapshot)
            raise UserError(
                f"objective {self.objective.name!r} keeps a snapshot of the player, which Trainer does not; "
                f"expected one of {others}, or `avatarl train --objective {self.objective.name}`"
            )
        _check(self.model, self.processing_class)
        self.critics = self._open(critics) if self.objective.needs_critic else []
        try:
            self.objective.check_settings(len(self.processing_class), self._limits)
        except ValueError as error:
            raise UserError(str(error)) from error
        self._since_log, self._evaluation = _Means(), _Means()
        self._generator = torch.Generator(self.args.device)

    def _refuse_what_has_no_effect(self) -> None:
        for setting, is_set, instead in (
            ("processing_class", self.processing_class is None, "is missing; expected the tokenizer of all models"),
            ("compute_loss_func", self.compute_loss_func, "would never be called; the objective is the loss"),
            ("compute_metrics", self.compute_metrics, "would get no logits; evaluate() has the objective's metrics"),
            ("label_smoothing_factor", self.label_smoother, "has no effect; expected objective='label_smoothing'"),
            ("torch_compile", self.args.torch_compile, "would compile nothing; expected model.base_model.compile()"),
            ("fsdp", self.args.fsdp or self.is_fsdp_enabled, "is not supported; expected DDP, or `avatarl train`"),
            ("deepspeed", self.is_deepspeed_enabled, "is not supported; expected DDP"),
            ("n_gpu", self.args.n_gpu > 1, f"is {self.args.n_gpu}; expected one process for each GPU, as by torchrun"),
        ):
            if is_set:
                raise UserError(f"{setting} {instead}")

    def _open(self, critics: CriticLike | Sequence[CriticLike] | None) -> list[Critic]:
        given = [critics] if isinstance(critics, CriticLike) else critics or []
        dtype = torch.bfloat16 if self.args.bf16 else torch.float32
        return [open_critic(critic, self.processing_class, dtype=dtype, device=self.args.device) for critic in given]

    @property
    def _limits(self) -> list[tuple[int, int] | None]:
        return [critic.limits for critic in self.critics]

    # --- training ---

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """The micro-batches of an optimiser step, and how many positions count in it over all processes ()."""
        self._seed_generator(0, self.state.global_step)
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counted = torch.zeros((), dtype=torch.int64, device=device)
        for batch in batches:
            counted += count_valid(targets_of(batch)).to(device)
        return batches, self.accelerator.reduce(counted, "sum")

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch: Tensor | None = None):
        """This batch's part of the step's loss, times the number of processes: DDP takes the mean over them."""
        num_valid = count_valid(targets_of(inputs)) if num_items_in_batch is None else num_items_in_batch
        judged = self._judge(model, inputs, num_valid)
        self._since_log.add(judged.metrics, judged.counted / num_valid.clamp(min=1))
        loss = judged.loss if num_items_in_batch is None else judged.loss * self.accelerator.num_processes
        return (loss, judged.metrics) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's logs; a line of training gets the objective's metrics.

        Its loss is replaced by the same without ``logging_nan_inf_filter``, which would hide a loss that is no number.
        """
        if "loss" in logs:
            logs |= self._since_log.over(self.accelerator)
        if {"loss", "train_loss"} & logs.keys():  # training ends with a line of its own
            self._since_log = _Means()
        super().log(logs, start_time)

    # --- evaluation ---

    def evaluation_loop(
        self, dataloader: DataLoader, *args, metric_key_prefix: str = "eval", **kwargs
    ) -> EvalLoopOutput:
        """Trainer's loop; the loss and all metrics become means over the positions of the whole set.

        Raises:
            UserError: Processes would be given examples twice.
        """
        if isinstance(dataloader.dataset, IterableDatasetShard):
            raise UserError(
                "accelerator_config: dispatch_batches is False, with which processes repeat examples of an "
                "IterableDataset; expected True, or a dataset with a length"
            )
        if isinstance(dataloader.batch_sampler, BatchSamplerShard):
            # A collator may make any rows of examples, so what was given twice could not be told afterwards.
            dataloader.batch_sampler.even_batches = False
        self._evaluation, nothing = _Means(), torch.zeros((), device=self.args.device)
        # A process may get no batch at all, and still takes part in the sums.
        names = self.objective.metric_names(self._limits)
        self._evaluation.add(dict.fromkeys(names, nothing), nothing)
        self._seed_generator(1)
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        means = self._evaluation.over(self.accelerator)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output

    def prediction_step(self, model, inputs, prediction_loss_only: bool, ignore_keys: list[str] | None = None):
        """Adds a batch to the evaluation; there are no logits, and no loss of a batch that processes would gather."""
        inputs = self._prepare_inputs(inputs)
        inputs = {**inputs, "labels": self._without_repeats(labels_of(inputs))}
        with torch.no_grad():
            judged = self._judge(model, inputs, num_valid=1)
        self._evaluation.add(judged.metrics, judged.counted)
        return None, None, None

    def _without_repeats(self, labels: Tensor) -> Tensor:
        """Labels (B, T) without those of rows that repeat others, in the last batch that a process deals to all."""
        state = self.accelerator.gradient_state
        if state.end_of_dataloader and isinstance(state.active_dataloader, DataLoaderDispatcher):
            before = self.accelerator.process_index * len(labels)
            labels = labels.clone()
            labels[max(0, state.remainder - before) :] = IGNORED
        return labels

    # --- both ---

    def _judge(self, model: nn.Module, inputs: dict[str, Tensor], num_valid: Tensor | int) -> Judged:
        """Loss and metrics, sums over the batch's positions divided by ``num_valid``."""
        targets = targets_of(inputs)
        player = self.accelerator.unwrap_model(model)
        uniforms = None
        if self.objective.num_uniforms:
            shape = targets.numel(), self.objective.num_uniforms
            uniforms = torch.rand(shape, generator=self._generator, device=targets.device)

        def forward(**reads: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return linear_objective_loss(
                self.objective,
                last_hidden_of(player, reads),
                head_weight(player),
                answers,
                None,
                targets,
                ignore_index=IGNORED,
                vocab_size=len(self.processing_class),
                num_valid=num_valid,
                uniforms=uniforms,
            )

        # Trainer's own autocast is inside the forward that is replaced.
        with _forward_replaced(player, forward), self.accelerator.autocast():
            answers = [answers_of(critic, inputs) for critic in self.critics]
            loss, metrics = model(**reads_of(inputs))
        return Judged(loss, metrics, count_valid(targets))

    def _seed_generator(self, *place: int) -> None:
        """Let the draws of sampled objectives depend on the place in the run, and on nothing drawn before it."""
        seeds = np.random.SeedSequence([self.args.seed, self.accelerator.process_index, *place])
        self._generator.manual_seed(int(seeds.generate_state(1)[0]))

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if "window" not in self._signature_columns:
            self._signature_columns.append("window")


class _Means:
    """Weighted means of metrics; on the device until they are asked for."""

    def __init__(self):
        self._names: list[str] = []
        self._sums: Tensor | float = 0.0  # (metrics + 1,), the weights last

    def add(self, metrics: dict[str, Tensor], weight: Tensor) -> None:
        """Metrics () that are multiplied by their weight () already."""
        self._names = list(metrics)
        self._sums = self._sums + torch.stack([*metrics.values(), weight]).detach()

    def over(self, accelerator: Accelerator) -> dict[str, float]:
        """The means over what all processes added; NaN where all weights are 0."""
        sums = accelerator.reduce(self._sums, "sum")
        return dict(zip(self._names, (sums[:-1] / sums[-1]).tolist(), strict=True))


@contextmanager
def _forward_replaced(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Let whatever calls ``module`` call ``forward`` meanwhile.

    A loss computed beside the module would be outside of DDP's forward; then gradients would silently not be averaged.
    """
    replaced = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if replaced is not None:
            module.forward = replaced


def _check(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a model whose loss would not be that of its logits, or that lacks tokens."""
    if not isinstance(model, PreTrainedModel):
        raise UserError(f"model is a {name_of(model)}; expected a causal language model of transformers")
    name = f"model {name_of(model)}"
    with refusing(f"{name} cannot be run on tokens: "):
        check_rows(model, tokenizer, name)
        check_model(model, name)
        check_loss(model, name)
