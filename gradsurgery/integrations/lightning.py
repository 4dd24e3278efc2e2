"""Lightning (https://lightning.ai, 2.6.6 or newer: two releases before it on the registry were malicious).

`MultiTaskModule` is a `LightningModule` whose training step returns losses and whose `configure_optimizers` returns an
`MTLOptimizer`; what Lightning leaves to manual optimisation (schedulers, accumulation, clipping, scalers) it does. Any
other module takes the automatic road with one line: ``return combine(self, losses)`` at the end of its training step.
"""

import abc
from typing import Any, Literal

import torch
from lightning import LightningModule
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from gradsurgery.integrations.trainers import MicroBatches, step_log
from gradsurgery.losses import Losses
from gradsurgery.optimizer import MTLOptimizer, unwrap


def combine(module: LightningModule, losses: Losses) -> Tensor:
    """The loss () that a training step under automatic optimisation returns: `MTLOptimizer.combine` of the module's.

    Args:
        module: whose ``configure_optimizers`` returned an `MTLOptimizer`, and no other.
        losses: of the batch.

    Raises:
        TypeError: it has none, or several optimizers.
    """
    return optimizer_of(module).combine(losses)


def optimizer_of(module: LightningModule) -> MTLOptimizer:
    """The module's `MTLOptimizer`, without what Lightning puts around it.

    Raises:
        TypeError: it has none, or several optimizers.
    """
    found = module.optimizers(use_pl_optimizer=False)
    if isinstance(found, list):
        raise TypeError(f"configure_optimizers returned {len(found)} optimizers; surgery has one, over all parameters.")
    return unwrap(found)


class MultiTaskModule(LightningModule, abc.ABC):
    """A module that is trained on several losses.

    A subclass has `task_losses` and ``configure_optimizers``, which returns an `MTLOptimizer` alone or with schedulers,
    as any LightningModule's; on the manual road, Lightning itself passes over a scheduler's ``"interval"`` and
    ``"monitor"``, for which there are arguments.

    Each step logs ``train/loss/<task>``, and ``train/weight/<task>`` where the method weighs.

    Args:
        automatic: take the automatic road, by `combine`: the trainer accumulates, clips and steps, at the price of one
            backward more, and heads take weighted gradients. Otherwise surgery proper, by manual optimisation.
        accumulate: micro-batches a step of the manual road, whose task gradients are summed before the surgery; means
            over samples are divided by it. (The trainer's ``accumulate_grad_batches`` is for the automatic road.)
        clip: norm to which the manual road clips the gradient of all parameters; None: as it is. (The trainer's
            ``gradient_clip_val`` is for the automatic road.)
        interval: when schedulers step on the manual road, after each ``"epoch"`` or each ``"step"``.
        monitor: the logged metric that `ReduceLROnPlateau` goes by on the manual road.

    Raises:
        ValueError: an argument is out of range, or belongs to the other road.

    Example:
        >>> import torch
        >>> from gradsurgery import MTLOptimizer
        >>> from gradsurgery.integrations.lightning import MultiTaskModule
        >>> class Module(MultiTaskModule):
        ...     def __init__(self):
        ...         super().__init__(clip=1.0)
        ...         self.trunk, self.heads = torch.nn.Linear(4, 8), torch.nn.ModuleList([torch.nn.Linear(8, 1)] * 2)
        ...     def task_losses(self, batch, batch_idx):
        ...         z = self.trunk(batch).tanh()
        ...         return {f"task {t}": (head(z) - t).square().mean() for t, head in enumerate(self.heads)}
        ...     def configure_optimizers(self):
        ...         return MTLOptimizer(torch.optim.Adam(self.parameters()), "cagrad", self.trunk.parameters())
    """

    def __init__(
        self,
        *,
        automatic: bool = False,
        accumulate: int = 1,
        clip: float | None = None,
        interval: Literal["epoch", "step"] = "epoch",
        monitor: str | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(accumulate, int) or accumulate < 1:
            raise ValueError(f"accumulate must be a whole number of micro-batches, 1 or more; got {accumulate!r}.")
        if clip is not None and not clip > 0:
            raise ValueError(f"clip must be a positive norm, or None; got {clip!r}.")
        if interval not in ("epoch", "step"):
            raise ValueError(f"interval must be 'epoch' or 'step'; got {interval!r}.")
        if automatic and (accumulate > 1 or clip is not None or interval != "epoch" or monitor is not None):
            raise ValueError(
                "On the automatic road the trainer accumulates, clips and steps schedulers: pass "
                "Trainer(accumulate_grad_batches=, gradient_clip_val=), and a scheduler's interval and monitor in what "
                "configure_optimizers returns."
            )
        self.automatic_optimization = automatic
        self._accumulate, self._clip, self._interval, self._monitor = accumulate, clip, interval, monitor
        self._micro_batches = MicroBatches()

    @abc.abstractmethod
    def task_losses(self, batch: Any, batch_idx: int) -> Losses:
        """The losses of a batch, as `MTLOptimizer.backward` takes them."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        losses = self.task_losses(batch, batch_idx)
        opt = optimizer_of(self)
        if self.automatic_optimization:
            total = opt.combine(losses)
            self._log_step(opt)
            return total
        last = self._micro_batches.waiting + 1 == self._accumulate or self.trainer.is_last_batch
        self._micro_batches.backward(opt, losses, of=self._accumulate, last=last, scaler=self._scaler())
        if last:
            self._step(opt)
        return None

    def _step(self, opt: MTLOptimizer) -> None:
        scaler = self._scaler()
        if self._clip is not None:
            # Gradients are scaled until the precision plugin's own step.
            limit = self._clip if scaler is None else self._clip * scaler.get_scale()
            torch.nn.utils.clip_grad_norm_([p for group in opt.param_groups for p in group["params"]], limit)
        wrapper: Any = self.optimizers()
        wrapper.step()
        opt.zero_grad()
        self._log_step(opt)
        self._step_schedulers("step", self.trainer.global_step)

    def _log_step(self, opt: MTLOptimizer) -> None:
        self.log_dict({f"train/{name}": value.float() for name, value in step_log(opt.info).items()})

    def on_train_epoch_end(self) -> None:
        """Tells the method and the schedulers that an epoch is over; an override must call it."""
        optimizer_of(self).epoch_end()
        if not self.automatic_optimization:
            self._step_schedulers("epoch", self.current_epoch + 1)

    def _step_schedulers(self, interval: str, count: int) -> None:
        """What the trainer does under automatic optimisation."""
        for config in self.trainer.lr_scheduler_configs:
            if self._interval != interval or count % config.frequency:
                continue
            metric = None
            if isinstance(config.scheduler, ReduceLROnPlateau):
                metric = self.trainer.callback_metrics.get(self._monitor or "")
                if metric is None:
                    raise RuntimeError(
                        f"ReduceLROnPlateau goes by monitor={self._monitor!r}, which nothing has logged; there are "
                        f"{sorted(self.trainer.callback_metrics)}."
                    )
            self.lr_scheduler_step(config.scheduler, metric)

    def _scaler(self) -> torch.amp.GradScaler | None:
        return getattr(self.trainer.precision_plugin, "scaler", None)
