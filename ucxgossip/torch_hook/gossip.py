"""An attached model: what its hooks do under backward, after the step and before a forward.

With ``mix="both"`` and ``combine="atc"`` a step goes: gradients are put bucket by bucket as
backward completes them and averaged in place (`gradients`); the optimizer steps; the new weights
are put and averaged under the next forward, where each module waits for its own buckets only
(`forward`). What travels stands in `exchange`; how one array does, in `ucxgossip.mixing`.
"""

from __future__ import annotations

import io
import logging
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, NoReturn, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray

from ucxgossip.device import Device
from ucxgossip.errors import ArgumentError, ClosedError, GossipError, MismatchError, ModelError
from ucxgossip.group import Group
from ucxgossip.members import ANY
from ucxgossip.mixing import Modes
from ucxgossip.schedule import Schedule
from ucxgossip.torch_hook.exchange import Exchange
from ucxgossip.torch_hook.forward import Forward, Hook
from ucxgossip.torch_hook.gradients import Gradients
from ucxgossip.torch_hook.noise import NoiseCorrection
from ucxgossip.torch_hook.oversight import LeftOut, OtherOptimizers
from ucxgossip.torch_hook.scaler import Scaler, Watch
from ucxgossip.torch_hook.shuffle import Shuffled
from ucxgossip.torch_hook.snapshot import Snapshots

MARK = "_ucxgossip"
"""Attribute by which parameters and optimizers know that they are attached."""

_LOG = logging.getLogger("ucxgossip")


def _numbers(value: Any) -> Any:
    """A tensor of any device and type as an array; all else as it is."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().to(torch.float64).numpy()
    return value


class Writer(Protocol):
    """What is used of ``torch.utils.tensorboard.SummaryWriter``."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int | None = None) -> object:
        """Log one number."""


class Gossip:
    """A model that gossips. Made by `attach`; `detach()` or the end of ``with`` undoes it."""

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        group: Group,
        modes: Modes,
        schedule: Schedule,
        runs: Sequence[Sequence[torch.nn.Parameter]],
        scaler: Scaler | None = None,
        label: str = "model",
        late: bool = False,
        device: Device | None = None,
    ) -> None:
        self.model, self.optimizer, self.group = model, optimizer, group
        self.modes, self.schedule, self.label = modes, schedule, label
        self._scaler, self._late = scaler, late
        self._steps = 0
        self._clock = lambda: ANY if modes.mix == "push_sum" else self._steps
        self._detached = False
        self._detaching = threading.RLock()
        self._shuffled: list[tuple[Iterable[Any], Shuffled]] = []
        self._epochs: list[int] = []
        self._told_of_loaders = False
        self._devices = group.suit_devices(label, device is not None)
        with group.naming(label):
            self._exchange = Exchange(
                *(model, optimizer, group, modes, schedule, runs, label),
                *(device, self._devices),
            )
        self._buckets = self._exchange.buckets
        # Two ranks average exactly; there is no noise left that an all-reduce would not have.
        corrects = modes.noise_correction and group.size > 2
        self._noise = (
            NoiseCorrection(optimizer, self._buckets, schedule, group) if corrects else None
        )
        self._gradients = Gradients(
            self._buckets, lambda: self._due(self._steps + 1), scaler, self._noise
        )
        self._exchange.adopt()
        self._snapshots = Snapshots(group, label, self._snapshot)
        self._handles: list[Any] = []
        self._forward = Forward(model, self._buckets, self._exchange.wait, self._exchange.arrange)
        if late:
            group.arrive(self._clock, self._fetch, self._go_on)
        else:
            with group.naming(label):
                self._exchange.broadcast()
            self._exchange.begin()
            group.found_model(self._clock)
        self._install()
        self._snapshots.offer()

    def _snapshot(self) -> bytes:
        """What a rank that comes in needs of this one, between two steps."""
        found = {
            "steps": self._steps,
            "epochs": [shuffled.epoch for _, shuffled in self._shuffled],
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "places": self._exchange.places(),
        }
        stream = io.BytesIO()
        torch.save(found, stream)
        return stream.getvalue()

    def _fetch(self) -> None:
        """Take over a member's weights and optimizer state, for now."""
        snapshot = self._snapshots.fetch()
        if snapshot is None:
            return
        # The other rank's device may have another number here, or be none.
        found = torch.load(io.BytesIO(snapshot), map_location="cpu", weights_only=True)
        self.model.load_state_dict(found["model"])
        self.optimizer.load_state_dict(found["optimizer"])
        if self._exchange.state is not None:
            self._exchange.state.take_over()
        with self.group.naming(self.label):
            self._exchange.collective.open()
        self._steps, self._epochs = int(found["steps"]), list(found["epochs"])
        self._places = found["places"]

    def _go_on(self, steps: int) -> None:
        """Go on with the others, who have made `steps` steps by now (ANY: each its own)."""
        every = self.modes.local_steps
        steps = self._steps if steps == ANY else steps
        self._exchange.enter(self._places, steps // every - self._steps // every)
        self._steps = self._exchange.meter.quarantine.step = steps

    def _install(self) -> None:
        setattr(self.optimizer, MARK, True)
        for bucket in self._buckets:
            for parameter in bucket.parameters:
                setattr(parameter, MARK, True)
        self._handles += self._gradients.install()
        keep = self._handles.append
        keep(self.optimizer.register_step_pre_hook(self._before_step))
        keep(self.optimizer.register_step_post_hook(self._after_step))
        keep(self.optimizer.register_state_dict_pre_hook(self._before_optimizer_state))
        keep(self.optimizer.register_load_state_dict_pre_hook(self._before_optimizer_state))
        self._own_zero_grad = vars(self.optimizer).get("zero_grad")
        self._original_zero_grad = self.optimizer.zero_grad
        # Nothing but this model's parameters, dropped as torch does it?
        plain = type(self.optimizer).zero_grad is torch.optim.Optimizer.zero_grad
        self._plain_zero_grad = plain and self._own_zero_grad is None
        self._all = {id(p) for bucket in self._buckets for p in bucket.parameters}
        self._left_out = LeftOut(self.model, self.optimizer, self._all)
        keep(OtherOptimizers(self.optimizer, self._all, self._exchange.settle))
        if self._gradients.travel:
            self.optimizer.zero_grad = self._zero_grad  # type: ignore[method-assign]
        if self._scaler is not None:
            keep(Watch(self._scaler, self.optimizer, self._after_scaler))
        if self.modes.in_place:
            self._handles += self._forward.install()
            for register in (
                self.model.register_state_dict_pre_hook,
                self.model.register_load_state_dict_pre_hook,
            ):
                chosen: Any = register
                keep(chosen(Hook(self._before_state_dict)))

    # --- hooks ---------------------------------------------------------------------------------

    def _zero_grad(self, set_to_none: bool = True) -> None:
        """The optimizer's ``zero_grad``; gradients that travel are zeroed where they are."""
        held = {id(p) for each in self.optimizer.param_groups for p in each["params"]}
        if self._plain_zero_grad and held == self._all:
            for bucket in self._buckets:
                bucket.zero_gradients()
            return
        self._original_zero_grad(set_to_none)
        for bucket in self._buckets:
            bucket.reset_gradients(held)

    def _due(self, step: int) -> bool:
        """Whether the `step`-th step (from 1 on) has a round."""
        return step % self.modes.local_steps == 0

    def _after_scaler(self) -> None:
        """``GradScaler.step`` has ended; gradients that wait for a step still were skipped."""
        if self._gradients.went_backward:
            self.skip_step()

    def _before_step(self, _: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._check_attached()
        self._left_out.check()
        self.group.rest(self._clock)
        self._gradients.check_ended()
        for bucket in self._buckets:
            if (moved := bucket.moved()) is not None:
                self._refuse(moved)
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)  # args[0]: optimizer
        if self._noise is not None and closure is not None:
            raise ArgumentError(
                "noise_correction needs the gradients before the step; call backward() first and "
                "optimizer.step() without a closure"
            )
        self._exchange.settle()
        if self._noise is not None and self._gradients.went_backward:
            self._noise.before_step()

    def _refuse(self, moved: torch.nn.Parameter) -> NoReturn:
        names = (name for name, each in self.model.named_parameters() if each is moved)
        name = next(names, f"a parameter of shape {tuple(moved.shape)}")
        raise ModelError(
            f"{name} was given other memory after attach (model.to(), .double(), .data = ...), so "
            "it would no longer be averaged; detach() before, attach() again after"
        )

    def _after_step(self, *_: object) -> None:
        if self._noise is not None:
            self._noise.after_step()
        self._end_step(stepped=True)

    def _end_step(self, stepped: bool) -> None:
        """Count a step, taken or skipped, and start its rounds."""
        self._steps += 1
        self.group.passed_step(self._clock)
        self._exchange.meter.quarantine.step = self._steps
        self._gradients.step_done()
        every = self.modes.global_average_every
        if every is not None and self._steps % every == 0:
            self._exchange.average_weights()
        if self._due(self._steps):
            self._exchange.post(stepped)
        if self._exchange.complete:
            self._snapshots.between_steps()

    def _before_state_dict(self, *_: object) -> None:
        if not self._over:  # nothing moves any more: an emergency checkpoint
            self.wait()

    def _before_optimizer_state(self, *_: object) -> None:
        if self._noise is not None:
            self._noise.restore()
        if not self._over:
            self._exchange.settle_state()

    @property
    def _over(self) -> bool:
        return self.group.failed or self.group.closed

    # --- what a user calls ---------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """Optimizer steps of the training, skipped ones included.

        0 at first; a rank that comes to a running job begins with those of the others, and a
        loop over ``range(gossip.steps, total)`` ends with theirs.
        """
        return self._steps

    def no_sync(self) -> AbstractContextManager[None]:
        """Gradients of a ``backward()`` in here stay local and accumulate, as in DDP."""
        return self._gradients.no_sync()

    def wait(self) -> None:
        """Block until every weight round under way has ended; the parameters are whole then.

        The hooks do so before a forward and a ``state_dict()``; call it before reading or writing
        parameters by other ways (``model.parameters()``, a metric on weights, a clamp after the
        step): what is written while a round is under way is lost or torn. Under push-sum it takes
        in what has come, and waits for nobody. Under ``"awc"`` and with staleness there is nothing
        to wait for: the weights change in the step only, and may not be written by others between
        steps.
        """
        self._check_attached()
        self._exchange.wait()

    def skip_step(self) -> None:
        """Take part in a step's rounds without taking the step, the weights staying as they are.

        For a rank that has no batch where others have one, or leaves out a step that others take:
        ranks of a gossip job must run the same number of rounds. Gradients that were not exchanged
        yet count as zero. Called by the hooks where `GradScaler` skips a step, and by `shuffled`.
        """
        self._check_attached()
        self._gradients.check_ended()
        self._gradients.exchange_zeros()
        self._exchange.settle()
        self._end_step(stepped=False)

    def shuffled(self, loader: Iterable[Any]) -> Shuffled:
        """`loader`'s batches, passed round the ring of ranks as they come: see `Shuffled`.

        Each rank trains on the batches of all, so that shards may be skewed; over an epoch every
        sample is seen once. ``for x, y in gossip.shuffled(loader)`` is one epoch; the same loader
        gives the same `Shuffled`. A rank that gets no batch in a step takes part by `skip_step`:
        where several batches make a step, give all ranks equally many. A progress bar goes
        outside, ``tqdm(gossip.shuffled(loader))``: another loader object is another ring, which
        begins with epoch 0 and is kept until `detach`.
        """
        self._check_attached()
        for known, shuffled in self._shuffled:
            if known is loader:
                return shuffled
        if self._shuffled and not self._told_of_loaders:
            self._told_of_loaders = True
            _LOG.warning(
                "shuffled() got another loader than before: each has a ring of its own, from "
                "epoch 0 on. If it is the same data each epoch, pass the same object: "
                "tqdm(gossip.shuffled(loader)), not gossip.shuffled(tqdm(loader))"
            )
        made = Shuffled(self.group, loader, self.skip_step)
        if len(self._shuffled) < len(self._epochs):
            made.epoch = self._epochs[len(self._shuffled)]
            if self._late:
                made.catch_up()
        self._shuffled.append((loader, made))
        return made

    def consensus_distance(self) -> float:
        """Relative RMS distance of the replicas, ``sqrt(mean_i |w_i - w|**2) / |w|``. Collective.

        Exact; moves the weights through O(log p) rounds, so for a log line, not for each step.
        """
        self.wait()
        return self._exchange.collective.consensus_distance(self._exchange.arrays)

    def average(self, values: Sequence[float] | NDArray[Any] | torch.Tensor) -> NDArray[np.float64]:
        """The mean of all ranks' `values`, of equal shape, such as losses or counts. Collective.

        values: numbers, an array, a tensor, or a list in which some are tensors, of any device. In
        float64, and the same on all ranks to rounding; for a log line, as `consensus_distance`. One
        rank's NaN or infinity is everybody's: these are no weights to be kept whole.
        `MismatchError` on all ranks where not all have equally many.
        """
        self._check_attached()
        several = isinstance(values, list | tuple)
        given = [_numbers(each) for each in values] if several else _numbers(values)
        found = np.array(given, np.float64, order="C")
        count = np.array([found.size, found.size**2], np.float64)
        self._exchange.collective.mean(count)
        if not np.allclose(count, (found.size, found.size**2), rtol=1e-9, atol=0.0):
            raise MismatchError(
                f"average: rank {self.group.rank} has {found.size} values, and all ranks together "
                f"{count[0]:.6g} in the mean; each must bring equally many"
            )
        self._exchange.collective.mean(found.reshape(-1))
        return found

    def synchronize(self) -> None:
        """Replace the weights and the float buffers by their mean over all ranks. Collective.

        For an evaluation or a checkpoint of one common model; equal on all ranks to rounding.
        Frozen parameters and the optimizer's state stay as they are. Under push-sum the mean is
        weighted by mass.
        """
        self._check_attached()
        self._exchange.average_weights()
        self._exchange.begin()
        self._exchange.average_buffers()

    def stats(self) -> dict[str, Any]:
        """What was exchanged so far, by this rank.

        steps: optimizer steps, skipped ones included; rounds: exchanges of one array; bytes:
        payload put; waits: how often the training thread blocked, wait_s: for how many seconds;
        exchange_s: seconds from post to end, over all rounds; hidden: the part of that under
        compute, 0 to 1; distance: squared distance to the partner's weights (its gradients, with
        ``mix="gradients"``; its slow weights, with outer) in the last round, measured while mixing,
        and disagreement its root; skipped: rounds that push-sum left out; nonfinite: chunks left
        out (messages, under push-sum), by the rank whose values held a NaN or an infinity, this one
        included; staleness: by rank received from, how many own steps late its values were mixed on
        average; mass: mean push-sum mass, 1 elsewhere; members: ranks that live; broken: rounds
        that a change of members broke off or left out; direct_ways: ranks into whose slots on their
        devices, mapped by this one, all buckets are copied straight, untested on hardware (the
        others', and all on the CPU, go through host memory); lost: of each rank that was lost its
        number, the epoch in which the others went on and when that was (seconds since 1970); came:
        the same of each rank that came in.
        """
        return {"steps": self._steps, **self._exchange.stats()}

    def write(self, writer: Writer, step: int | None = None) -> None:
        """Log `stats` to a TensorBoard ``SummaryWriter`` under ``gossip/``, at `step`.

        step: the optimizer steps so far by default. Staleness goes as its mean and its maximum,
        nonfinite as its sum, lost and came as how many.
        """
        found = self.stats()
        steps = found.pop("steps")
        edges = list(found.pop("staleness").values()) or [0.0]
        found["nonfinite"] = sum(found["nonfinite"].values())
        found["lost"], found["came"] = len(found["lost"]), len(found["came"])
        found |= {"staleness_mean": sum(edges) / len(edges), "staleness_max": max(edges)}
        for name, value in found.items():
            writer.add_scalar(f"gossip/{name}", value, steps if step is None else step)

    # --- checkpoints ---------------------------------------------------------------------------

    def _facts(self) -> dict[str, Any]:
        modes = self.modes.facts()
        del modes["nonfinite"]  # a resumed run may choose anew
        return {
            **modes,
            "schedule": self.schedule.describe(),
            "buckets": [bucket.weights.count for bucket in self._buckets],
        }

    def state_dict(self) -> dict[str, Any]:
        """What this rank needs, beside model and optimizer, to go on bit for bit. Collective.

        Each rank saves its own three, this one first (push-sum takes in what is under way):
        ``gossip.state_dict()``, ``model.state_dict()``, ``optimizer.state_dict()``. Where the
        result hangs on timing (push-sum; staleness with gradients, or above 1) it goes on, but not
        bit for bit.
        Of the loaders given to `shuffled` it holds the epoch, not the place within it.
        """
        self._check_attached()
        return {
            "facts": self._facts(),
            "steps": self._steps,
            "epochs": [shuffled.epoch for _, shuffled in self._shuffled],
            **self._exchange.save(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken. Collective.

        After `attach` (which gives all ranks rank 0's weights) load this rank's own model, then
        its optimizer, then this. `ArgumentError` if the modes, the schedule or the buckets differ.
        """
        self._check_attached()
        saved, here = state.get("facts"), self._facts()
        if not isinstance(saved, Mapping):
            raise ArgumentError("load_state_dict takes what gossip.state_dict() returned")
        for name in here:
            if saved.get(name) != here[name]:
                raise ArgumentError(
                    f"the checkpoint has {name}: {saved.get(name)!r}, this run has {here[name]!r}"
                )
        self._exchange.quiet()
        # Under push-sum ranks count their own steps.
        together = self.modes.mix != "push_sum"
        self.group.agree("load_state_dict", {"steps": state["steps"]} if together else {})
        self._steps = self._exchange.meter.quarantine.step = int(state["steps"])
        self._gradients.step_done()
        self._exchange.load(state)
        self._epochs = list(state["epochs"])
        for (_, shuffled), epoch in zip(self._shuffled, self._epochs, strict=False):
            shuffled.epoch = epoch

    # --- the end -------------------------------------------------------------------------------

    def _check_attached(self) -> None:
        if self._detached:
            raise ClosedError("this model was detached")

    def detach(self) -> None:
        """Finish the rounds under way and give the model back without hooks. Collective.

        Parameters keep their values, in memory of their own; hooks are gone; the optimizer's
        ``zero_grad`` is its own again. Memory and mailboxes are there for the next model
        (docs/resources.md). No round is waited for in a group that failed or closed. What ended
        the job is raised, after all this, if no call has raised it before.
        Further calls do nothing, in any thread.
        """
        with self._detaching:
            if not self._detached:
                self._detach()

    def _detach(self) -> None:
        self._snapshots.close()
        self.group.end_model(self.label, self._clock)
        usable = not self._over
        try:
            if usable:
                for _, shuffled in self._shuffled:
                    shuffled.close()
                self._exchange.finish()
                self.group.ended(self.label)
        except GossipError as error:
            self.group.abort(str(error))
            raise
        finally:
            self._leave()
        if usable:
            self._exchange.give_back(streams=not self._devices)
        elif not self.group.closed:
            self.group.tell_failure()

    def _leave(self) -> None:
        self._detached = True
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._gradients.travel:
            del self.optimizer.zero_grad
            if self._own_zero_grad is not None:
                self.optimizer.zero_grad = self._own_zero_grad  # type: ignore[method-assign]
        delattr(self.optimizer, MARK)
        for bucket in self._buckets:
            for parameter in bucket.parameters:
                delattr(parameter, MARK)
        self._exchange.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.detach()
        elif not self._detached:
            # Rounds may be under way that will never end: stop them, and tell the others.
            self.group.abort(f"{type(error).__name__}: {error}")
            self._leave()
