"""Endurance tests that take too long for the test suite: many answers, interruptions, obstacles.

    python tools/endure.py [--answers 1000] [--interrupts 100]

Needs Linux. Prints a table. Takes about three minutes on 2 idle cores. Exits with status 1 if a
row fails.
"""

import argparse
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

# By default PyTorch caches compiled code for each of the last 1,024 input shapes.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "1")

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
from af3 import AudioFlamingo3ForConditionalGeneration
from processor import AudioFlamingo3Processor
from signals import sound, write_wav

TINY = ROOT / "tiny"
CLIP = TINY / "samples" / "digits.wav"
COMMAND = [sys.executable, str(ROOT / "generate.py"), str(CLIP)]

# Runs the command line with 300 MB more memory than it uses after its imports.
WITHIN_300_MB = """
import resource, sys
import generate
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 300_000_000
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
sys.exit(generate.main())
"""


class Table:
    """Prints rows and records whether one has failed."""

    def __init__(self):
        self.failed = False
        print("| | |\n|---|---|")

    def add(self, what: str, figure: str, good: bool) -> None:
        if not good:
            self.failed = True
            figure += " FAILED"
        print(f"| {what} | {figure} |", flush=True)


def resident_megabytes() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


# ---- Many answers ----


class Server:
    """A model that answers questions about many sounds in one process."""

    def __init__(self):
        self.processor = AudioFlamingo3Processor.from_pretrained(TINY)
        self.model = AudioFlamingo3ForConditionalGeneration.from_pretrained(TINY, "cpu")

    def serve(self, answers: int, table: Table) -> None:
        """Sounds of many lengths, in batches of one to three."""
        rng = random.Random(0)
        served = 0
        early = 0.0
        while served < answers:
            rows = rng.randint(1, 3)
            waveforms = [sound(rng.randrange(321, 160000), seed=served + i) for i in range(rows)]
            batch = self.processor(["What sound is this?"] * rows, waveforms)
            self.model.generate(**batch, max_new_tokens=8, do_sample=False)
            served += rows
            if early == 0 and served >= 50:
                early = resident_megabytes()
        late = resident_megabytes()
        table.add(
            f"{served} answers in one process, about recordings of many lengths",
            f"{early:.0f} MB after the 50th, {late:.0f} MB after the last",
            late < 1.05 * early,
        )

    def serve_threads(self, table: Table) -> None:
        """Four threads share the model; each generates ten answers."""
        batches = []
        for i in range(4):
            waveform = sound(16000 * (i + 1), seed=i)
            batches.append(self.processor("Transcribe the input speech.", waveform))
        expected = [
            self.model.generate(**batch, max_new_tokens=16, do_sample=False) for batch in batches
        ]
        answers = {}

        def answer_ten_times(i: int) -> None:
            answers[i] = [
                self.model.generate(**batches[i], max_new_tokens=16, do_sample=False)
                for _ in range(10)
            ]

        threads = [threading.Thread(target=answer_ten_times, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        same = 0
        for i in answers:
            same += sum(torch.equal(answer, expected[i]) for answer in answers[i])
        figure = f"{same} are the same as on one thread"
        table.add("40 answers from four threads that share a model", figure, same == 40)


# ---- Obstacles ----


def shell(command: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True)


def obstruct(table: Table) -> None:
    """A full disk, closed pipes, slow pipes, and too little memory."""
    ask = " ".join(f"'{part}'" for part in COMMAND)
    full = shell(f"{ask} --quiet > /dev/full")
    one_error = full.stderr.startswith("error: ") and full.stderr.count("\n") == 1
    table.add("a full disk", full.stderr.strip(), full.returncode == 2 and one_error)

    pipe = shell(f"{ask} --quiet | true; echo ${{PIPESTATUS[0]}}")
    status = pipe.stdout.strip()
    good = status == "0" and pipe.stderr == ""
    table.add("a reader that has exited", f"status {status}, nothing on stderr", good)

    head = shell(f"{ask} | head -c 3")
    good = head.stdout == "sev" and "error" not in head.stderr
    table.add("`head -c 3`", repr(head.stdout), good)

    closed = shell(f"{ask} >&- 2>&-")
    good = closed.returncode == 0 and closed.stdout + closed.stderr == ""
    table.add("stdout and stderr closed", f"status {closed.returncode}", good)

    reader, writer = os.pipe()
    process = subprocess.Popen([*COMMAND, "--quiet"], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    time.sleep(4)  # meanwhile the answer is waiting in the pipe
    answer = os.read(reader, 100)
    good = process.wait() == 0 and answer == b"seven three one\n"
    table.add("a slow reader", answer.decode().strip(), good)

    with tempfile.NamedTemporaryFile(suffix=".wav") as clip:
        write_wav(Path(clip.name), torch.zeros(600 * 16000).numpy())
        command = [sys.executable, "-c", WITHIN_300_MB, clip.name, "--quiet"]
        small = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    good = small.returncode == 2 and small.stderr.startswith(
        "error: out of memory; shorten the audio"
    )
    table.add("ten minutes of audio in 300 MB", small.stderr.strip()[:75] + "…", good)


# ---- Interruptions ----


def interrupt(runs: int, table: Table) -> None:
    """Presses Ctrl-C at random moments, from the program's start to after its end."""
    rng = random.Random(0)
    options = ["--sample", "--temperature", "50", "--seed", "1", "--max-new-tokens", "400"]
    good = 0
    finished = 0
    for _ in range(runs):
        process = subprocess.Popen(
            [*COMMAND, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        # Python needs 0.05 s to reach the first line of the program.
        time.sleep(rng.uniform(0.1, 1.6))
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate()
        if process.returncode == 0:
            finished += 1
        whole_lines = output == b"" or output.endswith(b"\n")
        if process.returncode in (0, 130) and whole_lines and b"Traceback" not in errors:
            good += 1
    table.add(
        f"{runs} interruptions at random moments",
        f"{good} exited with 130, or with 0 after the answer ({finished}), all lines complete",
        good == runs,
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--answers", type=int, default=1000)
    parser.add_argument("--interrupts", type=int, default=100)
    args = parser.parse_args()
    table = Table()
    server = Server()
    server.serve(args.answers, table)
    server.serve_threads(table)
    obstruct(table)
    interrupt(args.interrupts, table)
    return 1 if table.failed else 0


if __name__ == "__main__":
    sys.exit(main())
