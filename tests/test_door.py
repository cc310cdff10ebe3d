"""Guests come in when all members are at one step: the pause, over a network that delays."""

import random
from collections import deque
from typing import Any

import pytest

from ucxgossip.members import ANY, NOW, OVER, Door


class World:
    """Ranks that train in lockstep of pairs: nobody may be two steps ahead of a neighbour.

    A step: the gradients of the next step are posted by whoever has made this one; who has made
    s steps waits, before the next, until its neighbours have made s.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.random = random.Random(seed)
        self.steps = [self.random.randrange(2) for _ in range(size)]
        self.links: dict[tuple[int, int], deque[dict[str, Any]]] = {}
        self.admitted: list[tuple[int, list[int], list[bool]]] = []
        self.refused: list[int] = []
        self.paused = [False] * size
        self.told = [(-1, -1)] * size
        self.doors = [self._make(rank) for rank in range(size)]

    def _make(self, rank: int) -> Door:
        def send(to: int, message: dict[str, Any]) -> None:
            if to == rank:
                self._receive(rank, rank, message)
            else:
                self.links.setdefault((rank, to), deque()).append(message)

        def admit(guest: int) -> None:
            self.admitted.append((guest, list(self.steps), list(self.paused)))

        members = tuple(range(len(self.steps)))
        door = Door(rank, send, lambda: members, admit, self.refused.append)
        door.kind, door.clock = "step", lambda: self.steps[rank]
        return door

    def _receive(self, rank: int, sender: int, message: dict[str, Any]) -> None:
        door = self.doors[rank]
        handlers = {"pause": door.on_pause, "paused": door.on_paused, "go": door.on_go}
        handlers[message["kind"]](sender, message)

    def _train(self, rank: int) -> None:
        """What the training thread of `rank` does next, if it can."""
        door, steps = self.doors[rank], self.steps[rank]
        near = [self.steps[(rank + way) % len(self.steps)] for way in (-1, 1)]
        if min(near) < steps:  # it has not got the weights of this step yet
            return
        pause = door.pause
        if pause is not None and steps >= pause.steps:
            self.paused[rank] = True
            if self.told[rank] != (pause.ticket, steps):
                self.told[rank] = (pause.ticket, steps)
                door.report(steps, pause.ticket)
            return
        self.paused[rank] = False
        self.steps[rank] += 1
        door.passed(self.steps[rank])

    def run(self) -> None:
        """Let ranks train and messages arrive in any order until somebody was let in."""
        for _ in range(20_000):
            if self.admitted or self.refused:
                return
            ready = [link for link, queue in self.links.items() if queue]
            if ready and self.random.random() < 0.5:
                sender, receiver = self.random.choice(ready)
                self._receive(receiver, sender, self.links[sender, receiver].popleft())
            else:
                self._train(self.random.randrange(len(self.steps)))
        raise AssertionError(f"nobody came in; steps {self.steps}, paused {self.paused}")


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("seed", range(60))
def test_all_pause_at_one_step(size: int, seed: int) -> None:
    world = World(size, seed)
    for _ in range(seed):
        world._train(world.random.randrange(size))
    world.doors[0].knock(size)
    world.run()
    ((guest, steps, paused),) = world.admitted
    assert guest == size
    assert len(set(steps)) == 1, steps
    assert all(paused)


def test_at_once_where_nobody_trains() -> None:
    world = World(3, 0)
    world.doors[0].kind = NOW
    world.doors[0].knock(7)
    assert [guest for guest, *_ in world.admitted] == [7]


def test_not_before_the_meeting() -> None:
    world = World(3, 0)
    world.doors[0].kind = "shuffled"
    world.doors[0].knock(7)
    assert world.admitted == [] and world.doors[0].guests == {7} and not world.links


def test_who_trains_no_more_ends_the_pause() -> None:
    world = World(3, 0)
    world.doors[2].over = True
    world.doors[0].knock(7)
    world.run()
    assert world.refused == [7] and world.admitted == []
    while any(world.links.values()):
        for (sender, receiver), queue in world.links.items():
            if queue:
                world._receive(receiver, sender, queue.popleft())
    assert [door.pause for door in world.doors] == [None] * 3
    assert OVER < ANY < 0


def test_all_go_on_when_the_guest_is_gone() -> None:
    world = World(2, 0)
    world.doors[0].knock(7)
    world.doors[0].gone(7)
    for message in world.links[0, 1]:
        world._receive(1, 0, message)
    assert [door.pause for door in world.doors] == [None, None]


def test_a_new_view_ends_everything() -> None:
    world = World(2, 0)
    world.doors[0].knock(7)
    for door in world.doors:
        door.reset()
    assert world.doors[0].pause is None and not world.doors[0].guests
    world.doors[0].knock(8)
    world.run()
    assert [guest for guest, *_ in world.admitted] == [8]
