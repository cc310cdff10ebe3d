"""All ranks of a training in one process: the replicas are the rows of one array.

Gradients of all replicas come from one ``vmap`` (three to four times a loop's speed on digits);
torch's own optimizers step the whole array, since what they do is elementwise; and the rows are
mixed, rank by rank, by the schedule and the kernel that the ranks of a real job run. So a method
can be judged over seeds and ranks in seconds, and a real job is to give the same weights (with
``both`` and staleness only the weights are late here).
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import functional_call, grad, vmap

from ucxgossip.bench import tasks
from ucxgossip.bench.methods import Method
from ucxgossip.bench.models import loss
from ucxgossip.bench.setting import Outcome, Setting, consensus, make_optimizer
from ucxgossip.kernels import mix_
from ucxgossip.kernels.second_moment import correct, noise_share
from ucxgossip.mixing import default_schedule, weights_shift
from ucxgossip.schedule import GlobalAverage, Schedule

Rows = NDArray[np.float32]

NOISE = "exp_avg_noise"
"""The optimizer's state entry of the running mean of the noise, as under `attach`."""


class Replicas:
    """All replicas' weights as rows of `weights`, their gradients and their evaluation."""

    def __init__(self, task: tasks.Task, ranks: int, seed: int) -> None:
        self.task = task
        model = task.model(seed)
        names = [name for name, _ in model.named_parameters()]
        shapes = [p.shape for p in model.parameters()]
        sizes = [p.numel() for p in model.parameters()]
        first = torch.cat([p.detach().flatten() for p in model.parameters()])
        self.weights = first.repeat(ranks, 1)

        def logits(flat: Tensor, x: Tensor) -> Any:
            parts = torch.split(flat, sizes)
            named = {n: p.view(s) for n, p, s in zip(names, parts, shapes, strict=True)}
            return functional_call(model, named, (x,))

        self.gradients = vmap(grad(lambda flat, x, y: loss(logits(flat, x), y)))
        self._logits = vmap(logits, in_dims=(0, None))

    @torch.no_grad()
    def judge(self) -> tuple[list[float], list[float]]:
        """Accuracy in percent and mean loss of each replica on the test set."""
        made = self._logits(self.weights, self.task.test_inputs)
        targets = self.task.test_targets
        right = (made.argmax(dim=-1) == targets).double().flatten(1).mean(dim=1)
        losses = [float(loss(each, targets)) for each in made]
        return (100 * right).tolist(), losses


class Mixer:
    """One method's rounds on rows, by the schedule and the kernel of the package."""

    def __init__(self, method: Method, schedule: Schedule, seed: int) -> None:
        self.method, self.schedule = method, schedule
        self.mass = np.ones(schedule.size)
        usual = weights_shift(schedule) if method.mix == "both" else 0
        self.gradient_round = 0
        self.weight_round = usual if method.shift is None else method.shift
        self._put: deque[tuple[int, Rows]] = deque()
        self._chance = np.random.default_rng((seed, 3))
        self._arrives = np.ones(schedule.size, dtype=bool)

    def begin_step(self) -> None:
        """Draw which ranks' puts of this step are left out."""
        if self.method.drop:
            self._arrives = self._chance.random(self.schedule.size) >= self.method.drop

    def _weight(self, rank: int, number: int) -> tuple[int, float] | None:
        """Who `rank` receives from in round `number`, and at what weight."""
        part = self.schedule.round(rank, number)
        if part.sender is None or not self._arrives[part.sender]:
            return None
        return part.sender, part.weight

    def mix(self, rows: Rows, number: int, received: Rows | None = None) -> None:
        """One round; `received`: what the ranks put, `rows` themselves where it is None."""
        put = rows.copy() if received is None else received
        for rank in range(len(rows)):
            part = self._weight(rank, number)
            if part is not None:
                mix_(rows[rank], put[part[0]], part[1])

    def mix_late(self, rows: Rows, number: int) -> None:
        """``w += a (w_j - w_i)`` with both of `staleness` steps ago, a = weight / staleness."""
        if len(self._put) == self.method.staleness:
            then, put = self._put.popleft()
            for rank in range(len(rows)):
                part = self._weight(rank, then)
                if part is not None:
                    moved = put[rank].copy()
                    mix_(moved, put[part[0]], part[1] / self.method.staleness)
                    rows[rank] += moved - put[rank]
        self._put.append((number, rows.copy()))

    def push_sum(self, arrays: list[Rows], number: int) -> None:
        """Send (z, half the mass), keep the other half; a put left out keeps its mass."""
        sent = np.zeros_like(self.mass)
        for rank in range(len(sent)):
            if self.schedule.round(rank, number).to is not None and self._arrives[rank]:
                sent[rank] = self.mass[rank] / 2
        kept = self.mass - sent
        before = [rows.copy() for rows in arrays]
        for rank in range(len(sent)):
            part = self._weight(rank, number)
            if part is not None:
                arriving = sent[part[0]]
                alpha = arriving / (kept[rank] + arriving)
                for rows, put in zip(arrays, before, strict=True):
                    mix_(rows[rank], put[part[0]], float(alpha))
                kept[rank] += arriving
        self.mass = kept


def average(rows: Rows) -> None:
    """The exact mean over all ranks into every row, as `Collective.average` does it."""
    exact = GlobalAverage(len(rows))
    everyone = Mixer(Method("mean"), exact, 0)
    for number in range(exact.period):
        everyone.mix(rows, number)


def simulate(
    task: tasks.Task, method: Method, setting: Setting, schedule: Schedule | None = None
) -> Outcome:
    """Train `setting.ranks` replicas by `method`; what came of it."""
    replicas = Replicas(task, setting.ranks, setting.seed)
    weights = replicas.weights
    optimizer = make_optimizer(setting.optimizer, [weights], setting.rate)
    shards = task.shards(setting.ranks, setting.shards, setting.seed)
    chosen = default_schedule(method.mix, setting.ranks) if schedule is None else schedule
    mixer = Mixer(method, chosen, setting.seed)
    outcome, when = Outcome(), setting.evaluated_after()
    for step in range(setting.steps):
        for each in optimizer.param_groups:
            each["lr"] = setting.rate_at(step)
        indices = torch.from_numpy(
            np.stack(
                [
                    tasks.batch(shard, setting.batch, setting.seed, rank, step)
                    for rank, shard in enumerate(shards)
                ]
            )
        )
        if method.shuffle:  # what comes from `step` places back in the ring
            indices = indices.roll(step, dims=0)
        with torch.no_grad():
            gradients = replicas.gradients(weights, task.inputs[indices], task.targets[indices])
        _step(method, mixer, optimizer, weights, gradients, step)
        if step + 1 in when:
            accuracies, losses = replicas.judge()
            outcome.steps.append(step + 1)
            outcome.accuracies.append(accuracies)
            outcome.losses.append(losses)
            outcome.consensus.append(consensus(weights))
    outcome.weights = weights.numpy()
    return outcome


def _step(
    method: Method,
    mixer: Mixer,
    optimizer: torch.optim.Optimizer,
    weights: Tensor,
    gradients: Tensor,
    step: int,
) -> None:
    """What happens between two forwards: rounds of gradients, the optimizer, rounds of weights."""
    rows, slopes = weights.numpy(), gradients.numpy()
    due = method.gossips and (step + 1) % method.local_steps == 0
    if due:
        mixer.begin_step()
    if method.name == "allreduce":
        gradients = gradients.mean(dim=0).expand_as(weights).contiguous()
    noise = Noise(mixer, optimizer, weights, slopes) if method.noise else None
    if due and method.mix in ("both", "gradients"):
        mixer.mix(slopes, mixer.gradient_round)
        mixer.gradient_round += 1
    before = rows.copy() if method.combine == "deferred" else None
    if due and method.combine == "awc" and method.weights_travel:
        mixer.mix(rows, mixer.weight_round)
    weights.grad = gradients
    if noise is not None:
        noise.before_step()
    optimizer.step()
    if noise is not None:
        noise.after_step()
    if method.global_every and (step + 1) % method.global_every == 0:
        average(rows)
    if due and method.weights_travel:
        _exchange(method, mixer, rows, before, _state(optimizer, weights) if method.state else [])


def _exchange(
    method: Method, mixer: Mixer, rows: Rows, before: Rows | None, state: list[Rows]
) -> None:
    """The round after the step. before: what is put where that is not `rows` themselves."""
    number = mixer.weight_round
    mixer.weight_round += 1
    if method.mix == "push_sum":
        mixer.push_sum([rows], number)
    elif method.staleness:
        mixer.mix_late(rows, number)
    elif method.combine != "awc":
        mixer.mix(rows, number, before)
    for each in state:
        # Under awc state and weights of one step meet at the next one.
        mixer.mix(each, number + (method.combine == "awc"))


class Noise:
    """The noise correction of one step, by the kernel of the package, on all rows at once."""

    def __init__(
        self, mixer: Mixer, optimizer: torch.optim.Optimizer, weights: Tensor, slopes: Rows
    ) -> None:
        self.optimizer, self.weights, self.mixed = optimizer, weights, slopes
        self.own = slopes.copy()
        size = mixer.schedule.size
        parts = [mixer.schedule.round(rank, mixer.gradient_round) for rank in range(size)]
        weight = [part.weight if part.sender is not None else 0.0 for part in parts]
        self.share = [noise_share(each, size) if each else 0.0 for each in weight]
        self.scale = np.array([1 / (2 * each) if each else 0.0 for each in weight], np.float32)
        self.floor = np.float32(2 / max(2, size))
        self.raw = np.empty_like(slopes)

    def _beta(self) -> float:
        return float(self.optimizer.param_groups[0]["betas"][1])

    def before_step(self) -> None:
        """Put moments in place from which the step arrives at the corrected ones."""
        self.half = (self.mixed - self.own) * self.scale[:, None]
        state = self.optimizer.state.get(self.weights, {})
        if NOISE not in state:
            return
        for rank, share in enumerate(self.share):
            correct(
                state["exp_avg_sq"].numpy()[rank],
                state[NOISE].numpy()[rank],
                self.raw[rank],
                self.mixed[rank],
                self.half[rank],
                np.float32(self._beta()),
                np.float32(share),
                self.floor,
            )

    def after_step(self) -> None:
        """Put the uncorrected moments back; the first step makes the state."""
        state = self.optimizer.state[self.weights]
        if NOISE in state:
            state["exp_avg_sq"].numpy()[:] = self.raw
            return
        rest = np.float32(1 - self._beta()) * np.array(self.share, np.float32)
        state[NOISE] = torch.from_numpy(rest[:, None] * self.half * self.half)


def _state(optimizer: torch.optim.Optimizer, weights: Tensor) -> list[Rows]:
    """The optimizer's tensors that are as large as the weights: momentum; Adam's m and v."""
    held = optimizer.state[weights].values()
    return [each.numpy() for each in held if torch.is_tensor(each) and each.shape == weights.shape]
