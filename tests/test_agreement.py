"""Agreement on who lives, over a network that delays as it likes and ranks that die at any time."""

import random
from collections import deque
from typing import Any

import pytest

from ucxgossip.members import Agreement, Facts, View


class World:
    """Ranks whose messages wait in links: in order on each link, in any order between links."""

    def __init__(self, size: int, seed: int = 0, guests: int = 0) -> None:
        self.random = random.Random(seed)
        self.links: dict[tuple[int, int], deque[dict[str, Any]]] = {}
        self.dead: set[int] = set()
        self.cut: set[frozenset[int]] = set()
        everyone = range(size + guests)
        self.views: dict[int, list[View]] = {rank: [] for rank in everyone}
        self.stopped: dict[int, str] = {}
        self.frozen: dict[int, list[int]] = {rank: [] for rank in everyone}
        first = View(0, tuple(range(size)))
        self.ranks = {rank: self._make(rank, first) for rank in everyone}

    def _make(self, rank: int, first: View) -> Agreement:
        def send(to: int, message: dict[str, Any]) -> None:
            if rank in self.dead:
                return
            if to in self.dead:  # the host refuses the connection
                self.notice(rank, to)
            elif frozenset((rank, to)) not in self.cut:
                self.links.setdefault((rank, to), deque()).append(message)

        def freeze(epoch: int) -> Facts:
            self.frozen[rank].append(epoch)
            return Facts((10 * epoch + rank, rank), passed=rank, result=f"{rank:02x}")

        def install(view: View) -> None:
            assert self.frozen[rank][-1] == view.epoch, "installed a view it did not prepare"
            self.views[rank].append(view)

        def expelled(reason: str) -> None:
            self.stopped[rank] = reason

        return Agreement(rank, first, send, freeze, install, expelled)

    def notice(self, rank: int, dead: int) -> None:
        """`rank` learns that `dead` is."""
        self.ranks[rank].suspect(dead, True)
        self.ranks[rank].turn_away(dead)

    def knock(self) -> None:
        """Let the guests ask all members, and learn what the view is."""
        members = [rank for rank in self.living if self.ranks[rank].inside]
        for guest in self.living:
            agreement = self.ranks[guest]
            if agreement.inside or not members:
                continue
            view = self.ranks[self.random.choice(members)].view
            if view.epoch > agreement.view.epoch and guest not in view.members:
                agreement.view = view
            for rank in members:
                self.ranks[rank].admit(guest)

    def kill(self, rank: int) -> None:
        """Take `rank` down; what it has sent may arrive or not."""
        self.dead.add(rank)
        for (sender, receiver), queue in self.links.items():
            if receiver == rank:
                queue.clear()
            elif sender == rank:
                while queue and self.random.random() < 0.5:
                    queue.pop()

    @property
    def living(self) -> list[int]:
        return [rank for rank in self.ranks if rank not in self.dead]

    def deliver(self) -> bool:
        """One message of one link; whether there was one."""
        ready = [link for link, queue in self.links.items() if queue]
        if not ready:
            return False
        sender, receiver = self.random.choice(ready)
        message = self.links[sender, receiver].popleft()
        if receiver not in self.dead:
            self.ranks[receiver].receive(sender, message)
        return True

    def watch(self, watchers: int = 2) -> None:
        """Let ranks notice who is dead: neighbours on the ring, and whom they have a link to."""
        for rank in self.living:
            members = self.ranks[rank].view.members
            if rank not in members or rank in self.stopped:
                continue
            place = members.index(rank)
            for k in range(1, watchers + 1):
                for step in (k, -k):
                    other = members[(place + step) % len(members)]
                    if other in self.dead:
                        self.notice(rank, other)
            for other in self.dead:
                if (rank, other) in self.links:
                    self.notice(rank, other)

    def run(self, kills: int = 0, chance: float = 0.1) -> None:
        """Deliver until nothing moves, killing `kills` ranks at random moments."""
        for _ in range(100_000):
            if kills and len(self.living) > 1 and self.random.random() < chance:
                self.kill(self.random.choice(self.living))
                kills -= 1
            if self.random.random() < 0.3:
                self.watch()
            if self.random.random() < 0.1:
                self.knock()
            if not self.deliver() and not kills:
                self.watch()
                self.knock()
                if not any(self.links.values()):
                    return
        raise AssertionError("the ranks never came to rest")


@pytest.mark.parametrize("size", [2, 3, 4, 5, 8, 13])
@pytest.mark.parametrize("seed", range(150))
def test_the_living_agree_whoever_dies_when(size: int, seed: int) -> None:
    world = World(size, seed)
    world.run(kills=1 + seed % (size - 1), chance=0.02 + 0.05 * (seed % 7))
    assert not world.stopped
    final = [world.ranks[rank].view for rank in world.living]
    assert all(view.members == tuple(world.living) for view in final), final
    assert len({view.epoch for view in final}) == 1
    by_epoch: dict[int, View] = {}
    for rank in world.living:  # a leader may die with a commit that nobody else has
        views = world.views[rank]
        epochs = [view.epoch for view in views]
        assert epochs == sorted(set(epochs)), f"rank {rank} installed {epochs}"
        for view in views:
            assert by_epoch.setdefault(view.epoch, view) == view
            assert rank in view.members
    if world.views[world.living[0]]:
        facts = final[0].facts
        assert facts.passed == max(final[0].members)
        assert facts.rounds[1] == max(final[0].members)
        assert facts.result == f"{max(final[0].members):02x}"


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("guests", [1, 3])
@pytest.mark.parametrize("seed", range(60))
def test_guests_come_in_whoever_dies_when(size: int, guests: int, seed: int) -> None:
    world = World(size, seed, guests)
    kills = seed % size
    world.run(kills=kills, chance=0.02 + 0.05 * (seed % 7))
    assert not world.stopped
    if not any(rank < size for rank in world.living):
        pytest.skip("all who could have let somebody in are dead")
    final = [world.ranks[rank].view for rank in world.living]
    assert all(view.members == tuple(world.living) for view in final), final
    assert len({view.epoch for view in final}) == 1
    for rank in world.living:
        epochs = [view.epoch for view in world.views[rank]]
        assert epochs == sorted(set(epochs)), f"rank {rank} installed {epochs}"


def test_a_guest_that_dies_while_it_comes_in_is_left_out() -> None:
    world = World(3, guests=1)
    world.ranks[0].admit(3)
    world.kill(3)
    world.notice(0, 3)
    world.run()
    assert [world.ranks[rank].view.members for rank in range(3)] == [(0, 1, 2)] * 3
    assert world.ranks[0].view.epoch == 1


def test_a_guest_that_does_not_answer_has_to_ask_again() -> None:
    world = World(3, guests=1)
    world.ranks[0].admit(3)
    world.links[0, 3] = deque()  # its prepare is lost
    while world.deliver():
        continue
    assert world.ranks[0].changing
    world.ranks[0].retry()
    while world.deliver():
        continue
    assert world.ranks[1].view == world.ranks[0].view
    assert world.ranks[0].view.members == (0, 1, 2)
    world.run()
    assert world.ranks[3].view.members == (0, 1, 2, 3)


def test_a_guest_is_in_once_another_member_than_the_leader_says_so() -> None:
    """What only the leader has committed may be passed over when it dies."""
    world = World(3, guests=1)
    world.ranks[0].admit(3)
    while not world.views[0]:
        assert world.deliver()
    assert not any(m["kind"] == "commit" for m in world.links.get((0, 3), ()))
    world.kill(0)
    for rank in (1, 2, 3):
        world.links[0, rank] = deque()
    world.run()
    assert not world.stopped
    assert {world.ranks[rank].view.members for rank in (1, 2, 3)} == {(1, 2, 3)}
    assert len({world.ranks[rank].view.epoch for rank in (1, 2, 3)}) == 1


def test_a_commit_that_one_rank_has_is_not_passed_over() -> None:
    """The leader dies after it told one member of three."""
    world = World(5)
    world.kill(4)
    world.ranks[0].suspect(4, True)
    while not world.views[0]:
        assert world.deliver()
    commit = next(m for m in world.links[0, 2] if m["kind"] == "commit")
    world.ranks[2].receive(0, commit)
    world.kill(0)
    for rank in (1, 2, 3):
        world.links[0, rank] = deque()
    world.run()
    assert [view.epoch for view in world.views[1]] == [1, 2]
    assert world.views[1] == world.views[2] == world.views[3]
    assert world.views[1][0].members == (0, 1, 2, 3)
    assert world.views[1][1].members == (1, 2, 3)


def test_the_smaller_side_of_a_cut_network_stops() -> None:
    world = World(5)
    world.cut = {frozenset((a, b)) for a in (0, 1) for b in (2, 3, 4)}
    for a in (0, 1):
        for b in (2, 3, 4):
            world.ranks[a].suspect(b, False)
            world.ranks[b].suspect(a, False)
    world.run()
    assert set(world.stopped) == {0, 1}
    assert "greater part" in world.stopped[0] and "[2, 3, 4]" in world.stopped[0]
    assert all(world.ranks[rank].view.members == (2, 3, 4) for rank in (2, 3, 4))


def test_of_two_halves_the_one_with_the_lowest_rank_goes_on() -> None:
    world = World(2)
    world.cut = {frozenset((0, 1))}
    world.ranks[0].suspect(1, False)
    world.ranks[1].suspect(0, False)
    assert world.ranks[0].view.members == (0,)
    assert set(world.stopped) == {1}


def test_half_may_die_where_death_is_proven() -> None:
    world = World(4)
    for rank in (0, 1, 3):
        world.kill(rank)
        world.run()
    assert world.ranks[2].view == View(3, (2,), world.ranks[2].view.facts, (1, 2))


def test_who_was_taken_for_dead_is_told_so() -> None:
    world = World(4)
    world.cut = {frozenset((0, other)) for other in (1, 2, 3)}
    for rank in (1, 2, 3):
        world.ranks[rank].suspect(0, False)
    world.run()
    assert world.ranks[1].view.members == (1, 2, 3)
    world.cut = set()  # it was only stopped, and thinks that another one is gone
    world.ranks[0].suspect(3, False)
    world.run()
    assert set(world.stopped) == {0}
    assert "go on without it (epoch 1)" in world.stopped[0]
    assert world.ranks[1].view.members == (1, 2, 3)


def test_a_false_suspicion_of_the_leader_costs_it_its_place() -> None:
    world = World(4)
    world.ranks[1].suspect(0, False)
    world.run()
    assert world.ranks[1].view.members == (1, 2, 3)
    world.ranks[0].suspect(1, False)
    world.run()
    assert set(world.stopped) == {0}


def test_suspects_that_are_no_members_are_no_news() -> None:
    world = World(3)
    world.ranks[0].suspect(7, True)
    world.ranks[0].suspect(0, True)
    assert not world.deliver()
    assert not world.ranks[0].changing
