"""Programs run to their end, with errors of one line. Standard library only; each caller has its
own kind of error.
"""

import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

Done = subprocess.CompletedProcess[str]
_SHOWN_WORDS = 8  # of a command, in a message


def run(
    *command: str,
    error: type[Exception],
    advice: str = "",
    seconds: float = 120,
    cwd: Path | str | None = None,
    input: str = "",
    merge: bool = False,
) -> Done:
    """Run a program, whatever its exit status is.

    :param error: raised if there is no such program, or it is not done in ``seconds``
    :param advice: what to add if there is no such program
    :param merge: have its standard error in its output
    """
    try:
        return subprocess.run(
            command,
            cwd=cwd,
            input=input,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if merge else subprocess.PIPE,
            text=True,
            errors="replace",
            timeout=seconds,
            check=False,
        )
    except FileNotFoundError as e:
        raise error(f"{command[0]}: command not found{advice and f': {advice}'}") from e
    except subprocess.TimeoutExpired as e:
        raise error(f"{shown(command)}: not done in {seconds:g} s") from e


def output(
    *command: str,
    error: type[Exception],
    advice: str = "",
    seconds: float = 120,
    cwd: Path | str | None = None,
) -> str:
    """Run a program that has to succeed, and return its standard output.

    :param error: raised as by :func:`run`, and with the last line that a failing program wrote
    """
    done = run(*command, error=error, advice=advice, seconds=seconds, cwd=cwd)
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise error(f"{shown(command)}: exit status {done.returncode}: {said}")
    return done.stdout


def shown(command: Sequence[str]) -> str:
    """Return the beginning of a command line, for a message."""
    return " ".join(command[:_SHOWN_WORDS])


def end(process: subprocess.Popen[bytes], *signals: int, seconds: float) -> bool:
    """End a process by one signal after the other, and wait for each; tell whether it has ended."""
    for number in signals or (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            process.send_signal(number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
            return True
    return False
