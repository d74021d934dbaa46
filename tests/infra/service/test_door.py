"""Who may hold a connection: bounds hold in any order of coming and going, and robots at work are never ended."""

from __future__ import annotations

import random

import pytest

from infra.service.door import PER_ROBOT, Door, Guest


@pytest.mark.parametrize("seed", range(5))
def test_bounds_hold_and_robots_at_work_stay(seed: int) -> None:
    rng, door = random.Random(seed), Door(60, 10)
    held: list[Guest] = []
    for _ in range(3000):
        number = rng.random()
        held = [guest for guest in held if not guest.gone]
        at_work = {guest for guest in held if guest.robot is not None and guest.stage != "idle"}
        if number < 0.5 or not held:
            ended: list[int] = []
            guest = door.admit(f"10.0.0.{rng.randrange(8)}", lambda ended=ended: ended.append(1))
            if guest is not None:
                held.append(guest)
        elif number < 0.7:
            door.identify(rng.choice(held), rng.choice([None, "r0", "r1", "r2"]))
        elif number < 0.9:
            rng.choice(held).enter(rng.choice(["head", "body", "answer", "idle"]))
        else:
            door.leave(rng.choice(held))
            continue
        assert len(door) <= 60 and len(door) == sum(not guest.gone for guest in held)
        assert not any(guest.gone for guest in at_work if guest.stage != "idle")
        strangers = [guest for guest in held if not guest.gone and guest.robot is None]
        for robot in ("r0", "r1", "r2"):
            assert sum(guest.robot == robot and not guest.gone for guest in held) <= PER_ROBOT
        assert len(strangers) <= 60


def test_a_neighbours_silence_costs_only_the_neighbour() -> None:
    door = Door(100, 4)
    ended: list[int] = []
    quiet = [door.admit("a", lambda n=n: ended.append(n)) for n in range(4)]
    other = door.admit("b", lambda: ended.append(99))
    for n in range(4, 8):
        door.admit("a", lambda n=n: ended.append(n))
    assert ended == [0, 1, 2, 3] and all(guest is not None and guest.gone for guest in quiet)
    assert other is not None and not other.gone


def test_who_is_over_a_deadline_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("infra.service.door.time.monotonic", lambda: now[0])
    door = Door(100, 100)
    guests = {
        stage: door.admit("a", lambda: None) for stage in ("handshake", "head", "idle", "answer", "body", "linger")
    }
    for stage, guest in guests.items():
        assert guest is not None
        guest.enter(stage)  # type: ignore[arg-type]
    gone = []
    for now[0] in (1.0, 5.0, 11.0, 80.0, 700.0):
        door.sweep()
        gone.append({stage for stage, guest in guests.items() if guest is not None and guest.gone})
    assert gone[0] == set() and gone[1] == {"linger"} and gone[2] == {"linger", "handshake", "head"}
    assert gone[3] - gone[2] == {"idle"} and gone[4] - gone[3] == {"answer"}  # a body's deadline is its rate
