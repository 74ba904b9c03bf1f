"""The one training loop, for every objective and every stream of data.

In a step every rank reads its own rows of the global batch and runs them in micro-batches whose *summed*
losses add up in the gradient. The gradient is divided by the number of trained tokens of all ranks and
clipped by its global norm. Then the optimizer updates the weights once, in fp32.

Nothing here is random, and the stream depends only on its position, so a state consists of the weights, the
moments, the mean of the decay's weights and one integer. A run that is killed at any point and started again
ends with the same bits as an uninterrupted one. Under ``torchrun`` the same call runs on all ranks and sees
the same tokens in the same order.
"""

from __future__ import annotations

import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from ..data.stream import Stream
from ..dtypes import torch_dtype
from ..errors import TrainingError
from ..files import require_free_space
from ..llama.model import LlamaLM
from ..quant.straight_through import StraightThrough
from . import objectives, parallel, state
from .config import TrainConfig
from .metrics import MetricsLog
from .objectives import Objective
from .optim import Average, gradient_norm, moments, set_rate, set_updates
from .parallel import Ranks


@dataclass(frozen=True)
class TrainResult:
    """The outcome of a run. The weights are in the model.

    ``seconds`` counts all starts together. ``flops`` are those of the matmuls, a teacher's forwards included
    and recomputation not.
    """

    step: int
    tokens: int
    seconds: float
    flops: float
    last: dict[str, Any]  # the record of the last step
    averaged: int  # how many weights of the decay were averaged; 0: the weights are the last step's
    resumed_from: int


def train(
    model: LlamaLM,
    stream: Stream,
    objective: Objective,
    config: TrainConfig,
    folder: Path | str,
    *,
    mesh: DeviceMesh | None = None,
    rounding: StraightThrough | None = None,
    evaluate: Callable[[LlamaLM, int], Mapping[str, Any]] | None = None,
    on_step: Callable[[dict[str, Any]], None] | None = None,
    result_nbytes: int = 0,
) -> TrainResult:
    """Train ``model`` in place for ``config.steps`` steps, or resume from the newest state in ``folder``.

    ``folder`` receives ``metrics.jsonl`` and ``state/``. ``mesh`` is by default the processes of
    ``torchrun``, as replicas. With ``rounding`` the model computes with rounded weights, in evaluation too.
    Every rank calls ``evaluate(model, step)`` every ``config.eval_every`` steps and after the last. Its
    numbers go to the log. The first rank calls ``on_step(record)`` after every logged step. ``result_nbytes``
    is the size of what the caller writes into ``folder`` afterwards. A `stream` may have a ``signature`` (a
    JSON value): resuming on other data is then an error. Calling again after the end loads the result and
    returns.

    Ctrl-C and SIGTERM let the step finish, save the state and raise KeyboardInterrupt. Raises `TrainingError`
    for a loss that is not finite (naming step and rows), a batch that trains nothing, or a state that does
    not fit this run, and `StorageError` before the first step if states and result do not fit on the disk.
    """
    ranks = parallel.start() if mesh is None else parallel.ranks_of(mesh)
    parallel.distribute(model, ranks, torch_dtype(config.dtype))
    run = _Run(model, stream, objective, config, Path(folder), ranks, rounding)
    return run.run(evaluate, on_step, result_nbytes)


class _Run:
    """One call of `train`."""

    def __init__(
        self,
        model: LlamaLM,
        stream: Stream,
        objective: Objective,
        config: TrainConfig,
        folder: Path,
        ranks: Ranks,
        rounding: StraightThrough | None,
    ) -> None:
        self.model, self.stream, self.objective, self.config = model, stream, objective, config
        self.folder, self.ranks, self.rounding = folder, ranks, rounding
        try:
            self.rows = config.rows_of_rank(ranks.world)
        except ValueError as error:
            raise TrainingError(str(error)) from error
        if config.context > model.config.max_context:
            raise TrainingError(
                f"context={config.context} exceeds the model's max_context={model.config.max_context}"
            )
        self.params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.weights = {name: p.detach() for name, p in self.params.items()}
        self.device = next(model.parameters()).device
        self.optimizer = config.optimizer.build(model)
        self.average = Average()
        self.step = 0
        self.seconds = 0.0
        self.last: dict[str, Any] = {}
        self.signature = json.loads(
            json.dumps(
                objectives.signature(objective)
                | {"model": asdict(model.config), "stream": getattr(stream, "signature", None)}
                | ({"rounding": rounding.signature()} if rounding is not None else {})
                | config.trajectory()
            )
        )

    # The run ------------------------------------------------------------------------------------------------

    def run(self, evaluate: Any, on_step: Any, result_nbytes: int) -> TrainResult:
        config = self.config
        self.folder.mkdir(parents=True, exist_ok=True)
        finished = self._resume()
        resumed_from = self.step
        if not finished and self.ranks.first:
            require_free_space(self.folder, self._states_nbytes() + result_nbytes)
        log = MetricsLog(self.folder, self.step, tensorboard=config.tensorboard) if self.ranks.first else None
        with (
            _interrupts(once=self.ranks.mesh is None) as interrupted,
            parallel.prepared(
                self.model, activation_checkpointing=config.activation_checkpointing, compiled=config.compile
            ),
        ):
            try:
                stopping = False
                while not finished and self.step < config.steps:
                    self.last, stopping = self._step(interrupted)
                    self._log(log, self.last, on_step)
                    if self.step == config.steps:
                        break
                    if config.eval_every and self.step % config.eval_every == 0:
                        self._evaluate(evaluate, log)
                    if stopping or (config.save_every and self.step % config.save_every == 0):
                        path = self._save(log)
                    if stopping:
                        raise KeyboardInterrupt(
                            f"stopped after step {self.step} of {config.steps}; state in {path}"
                        )
                if not finished:
                    self._finish(evaluate, log)
                if interrupted.is_set():
                    raise KeyboardInterrupt(
                        f"stopped after the last step, {self.step}; the result is in the state"
                    )
            finally:
                if log is not None:
                    log.close()
        return self._result(resumed_from)

    def _finish(self, evaluate: Any, log: MetricsLog | None) -> None:
        """Put the mean of the decay's weights into the model, evaluate it and save it."""
        self.average.copy_to(self.weights)
        if not math.isfinite(norm := gradient_norm(list(self.weights.values()))):
            raise self._broken(f"the norm of the weights is {norm}")
        if self.config.eval_every:
            self._evaluate(evaluate, log)
        self._save(log, finished=True)

    def _result(self, resumed_from: int) -> TrainResult:
        tokens = self.step * self.config.tokens_per_step
        return TrainResult(
            step=self.step,
            tokens=tokens,
            seconds=self.seconds,
            flops=tokens * self._flops_per_token(),
            last=self.last,
            averaged=self.average.count,
            resumed_from=resumed_from,
        )

    # One step -----------------------------------------------------------------------------------------------

    def _step(self, interrupted: threading.Event) -> tuple[dict[str, Any], bool]:
        """Make one update. Return its record, and whether some rank was asked to stop."""
        config, began = self.config, time.perf_counter()
        rate = config.learning_rate(self.step)
        losses = self._forward_backward()
        names = sorted(losses[0].metrics)
        sums_M3 = torch.stack([_numbers(loss, names) for loss in losses])  # a row per micro-batch
        stop = torch.tensor([float(interrupted.is_set())], dtype=torch.float64, device=self.device)
        total, count, *others, stopping = self.ranks.sum(torch.cat([sums_M3.sum(0), stop])).tolist()
        if not count:
            raise TrainingError(
                f"step {self.step + 1}, {self._rows_text()}: no token is trained, every target is masked"
            )
        grads = [p.grad for p in self.params.values() if p.grad is not None]
        scale = self._gradient_scale(count)
        norm = gradient_norm(grads) * scale
        if not (math.isfinite(total) and math.isfinite(norm)):
            raise self._not_finite(total / count, norm, sums_M3[:, 0], rate)
        clip = config.optimizer.clip
        if clip is not None and norm > clip:
            scale *= clip / norm
        torch._foreach_mul_(grads, scale)
        set_rate(self.optimizer, rate)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if config.schedule.averages_at(self.step, config.steps):
            self.average.add(self.weights)
        took = time.perf_counter() - began
        self.seconds += took
        record: dict[str, Any] = {"step": self.step, "loss": total / count}
        record |= {name: value / count for name, value in zip(names, others, strict=True)}
        record |= {
            "lr": rate,
            "grad_norm": norm,
            "tokens": self.step * config.tokens_per_step,
            "targets": int(count),
        }
        return record | self._speed(took), bool(stopping)

    def _forward_backward(self) -> list[objectives.Loss]:
        """Add up the gradients of this rank's rows. Return the detached losses of its micro-batches."""
        micro = self.config.micro_batch_size or self.rows
        losses = []
        with self._rounded():
            for start in range(0, self.rows, micro):
                batch = self.stream.batch(self._first_row() + start, micro).to(self.device)
                parallel.postpone_reduction(self.model, last=start + micro == self.rows)
                with self._autocast():
                    loss = objectives.batch_loss(self.model, self.objective, batch)
                loss.total.backward()
                losses.append(loss._replace(total=loss.total.detach()))
        return losses

    def _rounded(self) -> Any:
        """Let the model compute with rounded weights, if it is trained for that."""
        return nullcontext() if self.rounding is None else self.rounding.applied()

    def _autocast(self) -> Any:
        """Cast weights at each matmul. FSDP2 needs no cast: it gathers them in the compute dtype."""
        dtype = torch_dtype(self.config.dtype)
        if dtype == torch.float32 or isinstance(self.model, FSDPModule):
            return nullcontext()
        return torch.autocast(self.device.type, dtype)

    def _gradient_scale(self, count: float) -> float:
        """Return the factor from the gradient of the summed loss to the gradient of the mean per token."""
        return (self.ranks.world if isinstance(self.model, FSDPModule) else 1) / count

    def _first_row(self) -> int:
        """Return the row of the stream where this rank's part of the step begins."""
        return self.config.start_position + self.step * self.config.batch_size + self.ranks.rank * self.rows

    def _rows_text(self) -> str:
        first = self.config.start_position + self.step * self.config.batch_size
        return f"rows {first} to {first + self.config.batch_size - 1}"

    def _not_finite(self, loss: float, norm: float, totals: Tensor, rate: float) -> TrainingError:
        """Return the error that names the micro-batch. Weights and states are those before the step."""
        micro = self.config.micro_batch_size or self.rows
        bad = (~totals.isfinite()).nonzero().flatten().tolist()
        nowhere = 1 << 62
        first = self.ranks.smallest(self._first_row() + bad[0] * micro if bad else nowhere)
        rows = self._rows_text() if first == nowhere else f"rows {first} to {first + micro - 1}"
        what = f"loss is {loss}" if first != nowhere else f"gradient norm is {norm}"
        kept = state.newest(self.folder)
        return TrainingError(
            f"{what} at step {self.step + 1}, {rows}, lr={rate:.3g}: start again with a lower lr, or look at "
            "these rows; " + (f"{kept} is kept, train into another folder" if kept else "no state was saved")
        )

    def _broken(self, what: str) -> TrainingError:
        """Return the error for weights that the last update broke, which the losses before cannot show."""
        return TrainingError(
            f"{what} after step {self.step}: start again in another folder, with a lower lr than "
            f"{self.config.optimizer.lr:g}"
        )

    def _speed(self, took: float) -> dict[str, float]:
        rate = self.config.tokens_per_step / took
        speed = {"tokens_per_s": rate, "seconds": self.seconds}
        if self.config.peak_flops is not None:
            speed["mfu"] = rate * self._flops_per_token() / (self.config.peak_flops * self.ranks.world)
        return speed

    def _flops_per_token(self) -> float:
        extra = getattr(self.objective, "extra_flops_per_token", None)
        own = self.model.config.flops_per_token(self.config.context / 2, training=True)
        return own + (extra(self.config.context) if extra is not None else 0.0)

    # Log, evaluation, state ---------------------------------------------------------------------------------

    def _log(self, log: MetricsLog | None, record: dict[str, Any], on_step: Any) -> None:
        if log is None or not (self.step % self.config.log_every == 0 or self.step == self.config.steps):
            return
        log.write(record)
        if on_step is not None:
            on_step(record)

    def _evaluate(self, evaluate: Any, log: MetricsLog | None) -> None:
        if evaluate is None:
            return
        with torch.no_grad(), self._rounded():
            numbers = dict(evaluate(self.model, self.step))
        if isinstance(self.model, FSDPModule):
            self.model.reshard()  # forwards without backward leave the root gathered
        if bad := [f"{name} is {value}" for name, value in numbers.items() if not math.isfinite(value)]:
            raise self._broken(bad[0])
        if log is not None:
            log.write({"step": self.step} | {f"eval/{key}": value for key, value in numbers.items()})

    def _tensors(self, *, finished: bool) -> dict[str, Tensor]:
        """Return the tensors of a state. For a finished run these are only the weights."""
        tensors = {f"model/{name}": weight for name, weight in self.weights.items()}
        if not finished:
            tensors |= moments(self.params, self.optimizer)
            tensors |= {f"average/{name}": mean for name, mean in self.average.mean.items()}
        return tensors

    def _states_nbytes(self) -> int:
        """Return the bytes of the states that will be on the disk at most, beyond those that are there."""
        weights = sum(weight.nbytes for weight in self.weights.values())
        one = weights * (4 if self.config.schedule.average_every else 3)  # with both moments, and the mean
        saves = (self.config.steps - self.step - 1) // self.config.save_every if self.config.save_every else 0
        missing = (
            self.config.keep_states + 1 - len(state.states(self.folder))
        )  # one is written before one goes
        return one * max(1, min(saves, missing)) + weights

    def _save(self, log: MetricsLog | None, *, finished: bool = False) -> Path:
        if log is not None:
            log.sync()
        progress = state.Progress(
            step=self.step,
            seconds=self.seconds,
            last=self.last,
            average_count=self.average.count,
            finished=finished,
            world=self.ranks.world,
            signature=self.signature,
        )
        tensors = self._tensors(finished=finished)
        return state.save(self.folder, progress, tensors, self.ranks, keep=self.config.keep_states)

    def _resume(self) -> bool:
        """Load the newest state if there is one. Return whether that run had finished."""
        if self.ranks.first:
            state.tidy(self.folder)
        self.ranks.barrier()
        path = state.newest(self.folder)
        if path is None:
            return False
        progress = state.progress_of(path)
        state.require_same(path, progress.signature, self.signature)
        if not progress.finished:
            self.average.empty_like(self.weights, progress.average_count)
        state.load(path, self._tensors(finished=progress.finished), self.ranks)
        set_updates(self.optimizer, progress.step)
        self.average.count = progress.average_count
        self.step, self.seconds, self.last = progress.step, progress.seconds, progress.last
        return progress.finished


def _numbers(loss: objectives.Loss, names: list[str]) -> Tensor:
    """Return total, denominator and metrics of a micro-batch as one float64 vector, to transfer once."""
    denominator = torch.as_tensor(loss.denominator, device=loss.total.device)
    values = (loss.total, denominator, *(loss.metrics[name] for name in names))
    return torch.stack([x.double() for x in values])


@contextmanager
def _interrupts(*, once: bool) -> Iterator[threading.Event]:
    """Yield an event that Ctrl-C and SIGTERM set until the block ends.

    With ``once`` a second Ctrl-C acts as usual, immediately. Under ``torchrun`` one Ctrl-C arrives twice,
    from the terminal and from its agent, which kills the process after 30 seconds anyway. Only the main
    thread can catch signals. In other threads the event is never set.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: Any) -> None:
        event.set()
        if once:
            print("stopping after this step; once more stops at once and loses it", file=sys.stderr)
            signal.signal(number, before[signal.Signals(number)] or signal.SIG_DFL)

    for name in before:
        signal.signal(name, ask)
    try:
        yield event
    finally:
        for name, handler in before.items():
            signal.signal(name, handler or signal.SIG_DFL)
