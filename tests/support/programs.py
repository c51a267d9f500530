"""Runs the command line as a user does: in a separate process or terminal.

Nothing here waits for a fixed time, only for events, so the tests also pass on a busy machine.
"""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
from contextlib import suppress

from places import ROOT

HANGS = 600  # seconds without output after which a terminal is considered hung
PROGRAM = [sys.executable, "-u", str(ROOT / "generate.py")]


def generate(*arguments, **options) -> subprocess.CompletedProcess:
    """Runs generate.py to its end and captures stdout and stderr as text."""
    command = PROGRAM + [str(argument) for argument in arguments]
    return subprocess.run(command, capture_output=True, text=True, **options)


def start_generate(*arguments) -> subprocess.Popen:
    """Starts generate.py with binary pipes."""
    command = PROGRAM + [str(argument) for argument in arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe)


class Terminal:
    """Runs generate.py in a pseudo-terminal."""

    def __init__(self, *arguments):
        self.main, self.other = pty.openpty()
        self.settings = termios.tcgetattr(self.other)
        command = PROGRAM + [str(argument) for argument in arguments]
        streams = {"stdin": self.other, "stdout": self.other, "stderr": self.other}
        self.process = subprocess.Popen(command, **streams)

    def read_until(self, pattern: bytes) -> bytes:
        shown = b""
        while not re.search(pattern, shown, re.DOTALL):
            readable, _, _ = select.select([self.main], [], [], HANGS)
            assert readable, shown
            shown += os.read(self.main, 1000)
        return shown


def interrupt_until_it_ends(process: subprocess.Popen) -> int:
    """Sends Ctrl-C until the program exits, as it may not be ready yet; returns the exit status."""
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(1)
    return process.returncode
