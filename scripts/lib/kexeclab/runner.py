"""Run a test's stages in a machine: one function after each start of a kernel.

A stage that fails is StageFailed; a machine that panics, hangs, ends or goes silent is LostMachine,
which says nothing of the project; what cannot be set up is LabError.
"""

import inspect
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kexeclab import LostMachine, StageFailed, kernels
from kexeclab.guest import Guest
from kexeclab.machine import Machine, Running, prepare, running
from kexeclab.project import CHECKOUT

Stage = Callable[[Guest], None]
BOOT_SECONDS = 120.0
STAGE_SECONDS = 300.0
#: How often a machine may be started that is lost before its first word.
BOOTS = 3
SILENT_SECONDS = 60.0
_PANIC = re.compile(r"Kernel panic - not syncing")
#: The line of a traceback that says what was raised.
_EXCEPTION = re.compile(r"[\w.]+(Error|Exception|Exit|Interrupt)\b")
_FIRST_LINE = re.compile(r"\[ *\d+\.\d+\] Linux version ")
_ANY_LINE = re.compile(r"\[ *\d+\.\d+\] ")


@dataclass(frozen=True)
class Switch:
    """One kernel after the other, on the host's clock (time.monotonic).

    A kernel prints from its first moment on only with ``earlyprintk=ttyS0``.

    :ivar left: the stage said that it leaves
    :ivar silent: the old kernel's last line on the console
    :ivar speaks: the new one's first line
    :ivar up: the agent's first word
    """

    left: float
    silent: float
    speaks: float
    up: float


@dataclass
class Result:
    """The report of a test's stages.

    :ivar figures: name to value and unit
    :ivar console: all the lines of the serial console
    :ivar boots: for each stage the seconds from the machine's start, or from the end of the stage
        before, to the agent's first word
    :ivar switches: one for each stage but the first
    :ivar sent: for each netdev that the host fed, when each packet was sent (time.monotonic)
    """

    figures: dict[str, tuple[float, str]] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    console: list[str] = field(default_factory=list)
    stages: list[str] = field(default_factory=list)
    boots: list[float] = field(default_factory=list)
    switches: list[Switch] = field(default_factory=list)
    sent: dict[str, list[float]] = field(default_factory=dict)

    def fed_between(self, name: str, start: float, end: float) -> int:
        """Count the packets that the host sent between two times."""
        return sum(start <= when < end for when in self.sent[name])


def run_stages(
    *stages: Stage,
    machine: Machine,
    parameters: dict[str, Any] | None = None,
    seconds: float = STAGE_SECONDS,
    echo: bool = False,
) -> Result:
    """Boot ``machine`` and run ``stages``, functions of a test file in this checkout.

    Each stage but the last ends by starting the next kernel (Guest.kexec, Guest.panic).

    :param parameters: what the stages find in Guest.parameters; JSON
    :param seconds: the time limit of each stage
    :raises StageFailed: a stage failed, with its report.
    :raises LostMachine: the machine is gone, or nobody knows what it does.
    :raises LabError: the machine cannot be set up.
    """
    parts = prepare(machine)
    for attempt in range(1, BOOTS + 1):
        result = Result()
        with running(machine, parts, echo) as alive:
            result.console = alive.console
            result.sent = {name: feed.sent for name, feed in alive.feeds.items()}
            play = _Play(alive, result, parameters or {}, seconds, time.monotonic())
            try:
                for number, stage in enumerate(stages, 1):
                    play.stage(number, stage, last=number == len(stages))
                break
            except (LostMachine, StageFailed) as error:
                # Nothing of the test has run before the first word.
                early = isinstance(error, LostMachine) and not result.boots
                if not early or attempt == BOOTS:
                    raise type(error)(_report(error, alive)) from None
                print(f"lost before its first word, booted again: {error}", flush=True)
    return result


def _report(error: Exception, alive: Running) -> str:
    """Tell what went wrong, the end of the console, and again in short what went wrong."""
    short, _, more = str(error).partition("\n")
    if raised := [line for line in more.splitlines() if _EXCEPTION.match(line)]:
        short = f"{short} {raised[-1]}"
    return f"{error}\n--- console:\n{alive.last_words()}\n--- {short}"


class Lab:
    """The runner of a test's stages (the fixture ``lab``).

    PKERNFS_LAB_KERNEL chooses the kernel of machines for which the test names none, and with
    PKERNFS_LAB_CONSOLE=1 the consoles are printed.
    """

    def machine(self, **settings: Any) -> Machine:
        """A machine; ``settings`` are fields of Machine."""
        chosen = os.environ.get("PKERNFS_LAB_KERNEL") or kernels.DEFAULT
        return replace(Machine(kernel=chosen), **settings)

    def run(
        self,
        *stages: Stage,
        machine: Machine | None = None,
        parameters: dict[str, Any] | None = None,
        seconds: float = STAGE_SECONDS,
    ) -> Result:
        """Run ``stages``, one after each start of a kernel: see run_stages."""
        return run_stages(
            *stages,
            machine=machine or self.machine(),
            parameters=parameters,
            seconds=seconds,
            echo=bool(os.environ.get("PKERNFS_LAB_CONSOLE")),
        )


@dataclass
class _Play:
    alive: Running
    result: Result
    parameters: dict[str, Any]
    seconds: float
    left_at: float
    cpu_before: float = 0.0
    waited_before: float = 0.0

    def stage(self, number: int, stage: Stage, last: bool) -> None:
        hello = self._hello(number)
        booted = time.monotonic()
        self.result.boots.append(booted - self.left_at)
        if number > 1:
            self.result.switches.append(self._switch(booted))
        self._say(
            f"stage {number}, {stage.__name__}: Linux {hello['release']} up after "
            f"{booted - self.left_at:.1f} s, {self._cpu()}"
        )
        limit = self.alive.clock.now() + self.seconds
        self.alive.send(
            file=str(Path(inspect.getfile(stage)).resolve().relative_to(CHECKOUT)),
            function=stage.__name__,
            notes=self.result.notes,
            parameters=self.parameters,
            seconds=self.seconds,
        )
        ended = self._until_it_ends(number, limit)
        self.result.stages.append(stage.__name__)
        self.left_at = time.monotonic()
        self._say(
            f"stage {number}, {stage.__name__}: {ended} after {self.left_at - booted:.1f} s, "
            f"{self._cpu()}"
        )
        if last and ended != "passed":
            raise StageFailed(f"stage {number}: left by {ended}, but there is no later stage")
        if not last and ended == "passed":
            raise StageFailed(f"stage {number}: ended without starting the next kernel")
        if not last:
            self.alive.send(go=True)

    def _hello(self, number: int) -> dict[str, Any]:
        """Wait for the next kernel's first message; the last one may still say something."""
        deadline = self.alive.clock.now() + BOOT_SECONDS
        while message := self._receive(deadline):
            match message:
                case {"hello": arrived}:
                    if arrived != number:
                        raise LostMachine(f"stage {number}: it came up in stage {arrived}")
                    return message
                case {"failed": report}:
                    raise StageFailed(f"stage {number - 1}:\n{report}")
                case _:
                    self._take(message)
        raise LostMachine(f"stage {number}: not up within {BOOT_SECONDS:g} s ({self._cpu()})")

    def _until_it_ends(self, number: int, deadline: float) -> str:
        """Take messages until the stage is over; return how it left."""
        while True:
            limit = min(deadline, self.alive.clock.now() + SILENT_SECONDS)
            message = self._receive(limit)
            if message is None and limit < deadline:
                raise LostMachine(
                    f"stage {number}: silent for {SILENT_SECONDS:g} s ({self._cpu()})"
                )
            if message is None or self.alive.clock.now() > deadline:
                raise StageFailed(f"stage {number}: not done in {self.seconds:g} s ({self._cpu()})")
            match message:
                case {"hello": _}:
                    raise LostMachine(f"stage {number}: the machine started anew")
                case {"failed": report}:
                    raise StageFailed(f"stage {number}:\n{report}")
                case {"passed": True}:
                    return "passed"
                case {"leaving": how}:
                    return str(how)
                case _:
                    self._take(message)

    def _take(self, message: dict[str, Any]) -> None:
        match message:
            case {"log": text}:
                self._say(str(text))
            case {"figure": name, "value": value, "unit": unit}:
                self.result.figures[name] = (value, unit)
                self._say(f"{name}: {value:g} {unit}")
            case {"note": key, "value": value}:
                self.result.notes[key] = value
                self.alive.send(noted=key)
            case {"feed": name, "rate": rate, "limit": limit}:
                self.alive.feeds[name].start(rate, limit)
                self.alive.send(feeding=name)
            case {"fed": name, "stop": stop}:
                feed = self.alive.feeds[name]
                if stop:
                    feed.stop()
                self.alive.send(sent=len(feed.sent))

    def _switch(self, up: float) -> Switch:
        """The change of kernels that has just ended, as the console tells it."""
        lines = list(zip(self.alive.console, self.alive.heard, strict=True))
        first = (t for line, t in lines if t >= self.left_at and _FIRST_LINE.search(line))
        speaks = next(first, up)
        before = [t for line, t in lines if t < speaks and _ANY_LINE.search(line)]
        return Switch(self.left_at, max(before, default=self.left_at), speaks, up)

    def _receive(self, deadline: float) -> dict[str, Any] | None:
        try:
            return self.alive.receive(deadline)
        except LostMachine as error:
            panics = [line for line in self.alive.console if _PANIC.search(line)]
            why = f"{error}; {panics[-1]}" if panics else str(error)
            raise LostMachine(why) from None

    def _cpu(self) -> str:
        """QEMU's CPU time since the last call, and how long it waited for a processor."""
        cpu, waited = self.alive.cpu_seconds(), self.alive.waited_seconds()
        text = f"{cpu - self.cpu_before:.1f} s of CPU time"
        if waited - self.waited_before >= 1:
            text += f", {waited - self.waited_before:.1f} s waiting for a processor"
        self.cpu_before, self.waited_before = cpu, waited
        return text

    def _say(self, text: str) -> None:
        self.result.log.append(text)
        print(text, flush=True)
