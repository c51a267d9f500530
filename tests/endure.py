"""What takes longer than a test may: serves many answers, interrupts many runs, and prints the README's table of figures.

    python tests/endure.py [--answers 1000] [--interrupts 100]        about three minutes on 2 quiet cores; leaves with 1 if a line fails
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

os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "1")  # torch's own cache of compiled shapes; by default it takes 1,024

import torch

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]
from af3 import AudioFlamingo3ForConditionalGeneration
from processor import AudioFlamingo3Processor
from signals import sound
from test_bad_sound import wav

TINY = TESTS.parent / "tiny"
CLIP = TINY / "samples" / "digits.wav"
COMMAND = [sys.executable, str(TESTS.parent / "generate.py"), str(CLIP)]
failed = []


def row(what: str, figure: str, good: bool) -> None:
    print(f"| {what} | {figure}{'' if good else ' FAILED'} |", flush=True)
    if not good:
        failed.append(what)


def resident() -> float:
    """Megabytes of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def serve(answers: int) -> None:
    """Answers about sounds of many lengths, in batches of one to three."""
    processor = AudioFlamingo3Processor.from_pretrained(TINY)
    model = AudioFlamingo3ForConditionalGeneration.from_pretrained(TINY, "cpu")
    rng, served, early = random.Random(0), 0, 0.0
    while served < answers:
        rows = rng.randint(1, 3)
        batch = processor(["What sound is this?"] * rows, [sound(rng.randrange(321, 160000), seed=served + i) for i in range(rows)])
        model.generate(**batch, max_new_tokens=8)
        served += rows
        if not early and served >= 50:
            early = resident()
    late = resident()
    row(f"{served} answers in one process, hardly two of a length", f"{early:.0f} MB after the 50th, {late:.0f} MB after the last", late < 1.05 * early)

    batches = [processor("Transcribe the input speech.", sound(16000 * (i + 1), seed=i)) for i in range(4)]
    alone, together = [model.generate(**batch, max_new_tokens=16) for batch in batches], {}
    threads = [threading.Thread(target=lambda i=i: together.update({i: [model.generate(**batches[i], max_new_tokens=16) for _ in range(10)]})) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    same = sum(torch.equal(answer, alone[i]) for i, answers in together.items() for answer in answers)
    row("40 answers of four threads that share a model", f"{same} as one thread gives them", same == 40)


def interrupt(runs: int) -> None:
    """Ctrl-C at random moments of the command line, from its start to after its end."""
    rng, good, finished = random.Random(0), 0, 0
    for _ in range(runs):
        process = subprocess.Popen([*COMMAND, "--model", str(TINY), "--sample", "--temperature", "50", "--seed", "1", "--max-new-tokens", "400"],
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        time.sleep(rng.uniform(0.1, 1.6))  # Python takes 0.05 s to reach the first line; until then it is its own master
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=20)
        finished += process.returncode == 0
        good += process.returncode in (0, 130) and out[-1:] in (b"\n", b"") and b"Traceback" not in errors
    row(f"{runs} interruptions at random moments", f"{good} left with 130, or 0 where the answer was out ({finished}), and no line unfinished", good == runs)


def run(command: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, **options)


def obstruct() -> None:
    """A full disk, a closed pipe, a reader that stops, too little memory."""
    ask = " ".join(f"'{part}'" for part in COMMAND)
    full = run(f"{ask} --quiet > /dev/full")
    row("a full disk", full.stderr.strip(), full.returncode == 2 and full.stderr.count("\n") == 1 and full.stderr.startswith("error: "))
    pipe = run(f"{ask} --quiet | true; echo ${{PIPESTATUS[0]}}")
    row("a reader that is gone", f"status {pipe.stdout.strip()}, nothing on stderr", pipe.stderr == "" and pipe.stdout.strip() == "0")
    head = run(f"{ask} | head -c 3")
    row("`head -c 3`", repr(head.stdout), head.stdout == "sev" and "error" not in head.stderr)
    closed = run(f"{ask} >&- 2>&-")
    row("stdout and stderr closed", f"status {closed.returncode}", closed.returncode == 0 and closed.stdout + closed.stderr == "")
    reading, writing = os.pipe()
    stalled = subprocess.Popen([*COMMAND, "--quiet"], stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    time.sleep(4)  # the answer waits in the pipe
    said = os.read(reading, 100)
    row("a reader that is late", said.decode().strip(), stalled.wait(20) == 0 and said == b"seven three one\n")
    with tempfile.NamedTemporaryFile(suffix=".wav") as clip:
        clip.write(wav(pcm=bytes(600 * 32000)))
        clip.flush()
        script = ("import generate, resource, sys; now = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize();"
                  "resource.setrlimit(resource.RLIMIT_AS, (now + 300_000_000,) * 2); sys.exit(generate.main())")
        small = subprocess.run([sys.executable, "-c", script, clip.name, "--quiet"], cwd=TESTS.parent, capture_output=True, text=True)
    row("ten minutes of sound in 300 MB", small.stderr.strip()[:75] + "…", small.returncode == 2 and small.stderr.startswith("error: shorten the audio"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=1000)
    parser.add_argument("--interrupts", type=int, default=100)
    args = parser.parse_args()
    print("| | |\n|---|---|")
    serve(args.answers)
    obstruct()
    interrupt(args.interrupts)
    sys.exit(bool(failed))
