"""Plans of faults, as data: what is done to each launch of a run, and to its files between two launches.

A plan is a list of `Launch`, one after the other; the launches after its end are undisturbed. `seeded_plan` and
`kills_plan` make plans that depend on their arguments alone; `fault_injection.py` carries them out.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

PROCESSES = 2


@dataclass(frozen=True)
class Layout:
    """How a launch is started: its processes, and settings that a resumed run may change."""

    processes: int = PROCESSES
    settings: tuple[str, ...] = ()

    def __str__(self) -> str:
        names = [setting.rpartition(".")[2] for setting in self.settings]
        return " ".join([str(self.processes), *names])

    def is_bitwise(self) -> bool:
        """Whether it sums in the order of REFERENCE."""
        return self.processes == PROCESSES and not any(text.startswith("parallel.") for text in self.settings)


REFERENCE = Layout()  # that of the undisturbed run
LAYOUTS = (
    Layout(1),
    Layout(PROCESSES, ("parallel.zero_stage=2",)),
    Layout(PROCESSES, ("parallel.zero_stage=3",)),
    Layout(PROCESSES, ("parallel.tensor=2",)),
    Layout(PROCESSES, ("parallel.context=2",)),
    Layout(PROCESSES, ("parallel.context=2", "parallel.ulysses=2", "parallel.zero_stage=2")),
    Layout(PROCESSES, ("parallel.pipeline=2",)),
)
READER_THREADS = (0, 1, 4)

MOMENTS = ("start", "step", "save", "commit")


@dataclass(frozen=True)
class Fault:
    """Something that happens to a launch.

    `moment`: "start": its launch is recorded; "step": it has made `after` steps; "save": after them, a save has begun;
    "commit": after them, a checkpoint has got its final name. `delay`: seconds after the moment, at most about a step.
    """

    kind: str  # a key of fault_injection.FAULTS
    rank: int = 0  # of those kinds that concern one rank
    moment: str = "step"
    after: int = 1
    delay: float = 0.0

    def __str__(self) -> str:
        rank = f" {self.rank}" if self.kind.endswith("rank") else ""
        steps = f" {self.after}" if self.moment == "step" else ""
        return f"{self.kind.replace('_', ' ')}{rank} at {self.moment}{steps}"


@dataclass(frozen=True)
class Damage:
    """Something that happens to the checkpoints of a run while it is not running."""

    kind: str  # a key of fault_injection.DAMAGE
    place: float = 0.0  # from 0 to below 1: which file, which of its bits, where it is cut

    def __str__(self) -> str:
        return self.kind.replace("_", " ")


@dataclass(frozen=True)
class Launch:
    """One launch: what is damaged before it, how it is started, and what happens to it."""

    layout: Layout = REFERENCE
    damage: Damage | None = None
    fault: Fault | None = None


FAULT_DECK = (
    "kill_rank", "kill_rank", "kill_rank", "kill_launcher", "kill_launcher", "term_launcher", "usr1_launcher",
    "term_rank", "usr1_rank", "stop_rank", "full_disk_rank",
)  # fmt: skip
DAMAGE_DECK = ("flip", "flip", "flip", "cut", "delete", "latest_gone", "latest_empty", "latest_dangling")
DAMAGE_EVERY = 2  # launches
DISTURBED_STEPS = 0.8  # fraction of the steps that the disturbed launches make at most, so that each of them is needed


def seeded_plan(seed: int, launches: int, steps: int) -> list[Launch]:
    """`launches` - 1 disturbed launches of a run of `steps` steps; the last launch of the run is to be undisturbed.

    The first half of them has the reference layout, so that their losses must be those of the undisturbed run bit for
    bit; the layouts of the others are random.
    """
    generator = random.Random(seed)
    faults, damage = Deck(generator, FAULT_DECK), Deck(generator, DAMAGE_DECK)
    layouts = Deck(generator, LAYOUTS)
    shares = [generator.uniform(0.2, 1.8) for _ in range(launches - 1)]
    plan = []
    for number, share in enumerate(shares):
        layout = REFERENCE if number < launches // 2 else layouts.draw()
        threads = f"data.reader_threads={generator.choice(READER_THREADS)}"
        layout = Layout(layout.processes, (*layout.settings, threads))
        damaged = number > 1 and number % DAMAGE_EVERY == 0
        after = max(1, int(DISTURBED_STEPS * steps * share / sum(shares)))
        fault = random_fault(generator, faults.draw(), layout, after)
        plan.append(Launch(layout, Damage(damage.draw(), generator.random()) if damaged else None, fault))
    return plan


def kills_plan(seed: int, kills: int, longest: int = 6) -> list[Launch]:
    """Launches in the reference layout, each killed on a random rank at a random instant of its first steps."""
    generator = random.Random(seed)
    return [
        Launch(fault=random_fault(generator, "kill_rank", REFERENCE, generator.randint(1, longest)))
        for _ in range(kills)
    ]


def random_fault(generator: random.Random, kind: str, layout: Layout, after: int) -> Fault:
    """A fault after `after` steps of its launch, or, if it kills, perhaps at its start or at the next save."""
    kills = kind.startswith("kill")
    moment = generator.choices(MOMENTS, (1, 4, 2, 1))[0] if kills else "step"
    rank = generator.randrange(layout.processes)
    return Fault(kind, rank, moment, after, round(generator.uniform(0, 0.03), 4))


CUT = [  # in a few launches: a kill during a save, stops, a hang, a full disk, damaged files, other layouts
    Launch(fault=Fault("kill_rank", 1, "save", after=7)),
    Launch(fault=Fault("term_launcher", after=6)),
    Launch(damage=Damage("flip", 0.3), fault=Fault("usr1_rank", 1, after=4)),
    Launch(damage=Damage("latest_gone"), fault=Fault("stop_rank", 1, after=3)),
    Launch(Layout(1), fault=Fault("kill_rank", 0, "commit", after=6)),
    Launch(Layout(PROCESSES, ("parallel.tensor=2", "data.reader_threads=1")), Damage("delete", 0.9),
           Fault("full_disk_rank", 1, after=2)),
    Launch(Layout(PROCESSES, ("parallel.zero_stage=3", "data.reader_threads=0")), Damage("cut", 0.5)),
]  # fmt: skip


class Deck:
    """Draws from a tuple in a random order, each entry once before any is drawn again."""

    def __init__(self, generator: random.Random, cards: tuple):
        self.generator, self.cards, self.left = generator, cards, []

    def draw(self):
        if not self.left:
            self.left = self.generator.sample(self.cards, len(self.cards))
        return self.left.pop()
