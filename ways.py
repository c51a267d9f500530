"""More ways to use Audio Flamingo 3 than one sound and one answer. Nobody needs this file to understand the model.

Weights that are not a checkpoint's own: AF-Think's adapter (think=True), half the memory (int8=True). Then what generate.py
hands over: a conversation (--chat), many sounds (several files, folders, --prompts) and one sound's journey (--explain).
"""
import argparse
import json
import os
import shutil
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from af3 import AudioFlamingo3ForConditionalGeneration, KeyValueCache, frame_counts
from generate import make_parser, model_and_options, one_line, plain, say
from load_weights import model_name, read_json, reading
from processor import N_SAMPLES, SAMPLE_RATE, AudioFlamingo3Processor, Batch, feature_batch

# ---- Thinking ----
def merge_adapter(model: nn.Module, folder: Path, dtype: torch.dtype) -> None:
    """Merges AF-Think's LoRA (Hu et al. 2021) into the weights, in float32, and puts what was trained beside it in place.
    Raises ValueError; a tensor of the adapter that finds no place is named.
    """
    adapter = folder / ("stage35" if (folder / "stage35").is_dir() else "think")
    if not adapter.is_dir():
        raise FileNotFoundError(f"{adapter}: no such directory; the AF-Think adapter is expected there, or in stage35/.")
    with reading(path := adapter / "adapter_config.json"):
        config = read_json(path)
        alpha, power = float(config["lora_alpha"]), 0.5 if config.get("use_rslora") else 1.0
        if not 0 < alpha < 1e9 or config.get("alpha_pattern"):
            raise ValueError(f"{path}: lora_alpha above 0, and no alpha_pattern, is expected.")
    with reading(path := adapter / "non_lora_trainables.bin"):
        given = {**torch.load(path, map_location="cpu", weights_only=True)}
    with reading(path := adapter / "adapter_model.safetensors"):
        given |= load_file(path)
        if odd := [name for name, tensor in given.items() if not tensor.is_floating_point()]:
            raise ValueError(f"{adapter}: floating point is expected of {', '.join(odd)}.")
        tensors = {model_name(name): tensor for name, tensor in given.items()}
        for name, weight in model.state_dict().items():
            factors = [name.removesuffix("weight") + f"lora_{factor}.weight" for factor in "AB"]
            if tensors.keys() >= {*factors}:
                a, b = (tensors.pop(factor).float() for factor in factors)  # (r, in), (out, r)
                tensors[name] = torch.addmm(tensors.get(name, weight).float(), b, a, alpha=alpha / len(a) ** power).to(dtype)
        unplaced = model.load_state_dict(tensors, strict=False, assign=True).unexpected_keys
    if named := [name for name in given if model_name(name) in unplaced]:
        raise ValueError(f"{adapter}: no place in the model for {', '.join(named)}.")

# ---- Half the memory ----
class Int8Linear(nn.Module):
    """A linear layer whose weight (out, in) is int8, with one scale an output row: half of bfloat16's bytes."""
    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.register_buffer("weight", torch.empty_like(linear.weight, dtype=torch.int8))
        self.register_buffer("scale", torch.empty_like(linear.weight[:, 0]))
        self.bias, self.chunk = linear.bias, 1 + (1 << 21) // linear.in_features  # rows: a few MB stay in the CPU's cache
        for rows, weight, scale in zip(*(x.split(self.chunk) for x in (linear.weight, self.weight, self.scale))):
            rows = rows.float()
            scale.copy_(rows.abs().amax(1) / 127).clamp_(min=torch.finfo(scale.dtype).tiny)
            weight.copy_((rows / scale[:, None]).round_())

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cpu and x[..., 0].numel() <= 8 and x.shape[-1] % 16 == 0:  # few tokens; at other widths the operator errs
            y = torch.ops.aten._weight_int8pack_mm(x.flatten(0, -2), self.weight, self.scale).unflatten(0, x.shape[:-1])
        else:
            y = torch.cat([F.linear(x, rows.to(x.dtype)) for rows in self.weight.split(self.chunk)], -1) * self.scale
        return y if self.bias is None else y + self.bias

def quantise(decoder: nn.Module) -> None:
    """Replaces the linear layers, one at a time, so that never both copies of more than one are in memory."""
    for module in decoder.modules():
        for name, layer in module.named_children():
            if isinstance(layer, nn.Linear):
                setattr(module, name, Int8Linear(layer))

# ---- A conversation ----
class Conversation:
    """Turns that share one key-value cache: no sound is heard twice, and a turn costs what is new in it."""

    def __init__(self, processor: AudioFlamingo3Processor, model: AudioFlamingo3ForConditionalGeneration):
        config = model.config.text_config
        self.processor, self.model, self.stopped = processor, model, False
        self.cache = KeyValueCache(config, 1, config.max_position_embeddings, model.dtype, model.device)
        self.forget()

    def forget(self) -> None:
        self.cache.used = 0
        self.cache.seen.zero_()
        self.unfed: list[int] = []  # the end of the last turn, which the cache does not hold yet

    def question(self, text: str, sounds: Iterable = ()) -> Batch:
        """The model's inputs for a user turn: the end of the turn before, this one, and the header of the answer."""
        content = [*({"type": "audio", "audio": sound} for sound in sounds), {"type": "text", "text": text}]
        # after the first turn a system message of nothing, which is skipped, keeps the usual one from being put in front
        system = [{"role": "system", "content": None}] if self.unfed else []
        batch = self.processor.apply_chat_template([*system, {"role": "user", "content": content}], add_generation_prompt=True)
        batch["input_ids"] = torch.cat([torch.tensor([self.unfed], dtype=torch.long), batch["input_ids"]], dim=1)
        del batch["attention_mask"]  # all ones
        return batch.to(self.model.device)

    def answer(self, question: Batch, **options) -> Iterator[Tensor]:
        """The answer's ids, each (1,), as soon as they are known; setting `stopped` ends it early. Options as `generate`'s."""
        used, said = self.cache.used, None
        try:
            for said in self.model.stream(**question, cache=self.cache, **options):
                used = self.cache.used
                yield said
                if self.stopped:
                    return
        finally:
            self.stopped, self.cache.used = False, used  # a step that failed is as if it had not been begun
            if said is not None:  # and not fed; where it ends the turn, the template's own end stands for it
                last = [id for id in said.tolist() if id not in self.processor.tokenizer.special]
                self.unfed = [*last, self.processor.end, *self.processor.tokenizer.encode("\n")]

def chat(args: argparse.Namespace, names: list[str], prompt: str | None) -> None:
    """A conversation in the terminal: a line is a question. Ctrl-C ends an answer; a second one, or one where a line is
    awaited, ends the conversation.
    """
    with suppress(ImportError):  # not on Windows
        import readline  # noqa: F401  with it input() has a history
    processor = AudioFlamingo3Processor.from_pretrained(args.model)
    sounds = [processor.waveform(name) for name in names]
    model, options = model_and_options(args)
    talk = Conversation(processor, model)
    waiting = False
    def interrupt(*_) -> None:
        if waiting or talk.stopped:
            raise KeyboardInterrupt  # not os._exit: readline has to give the terminal back
        talk.stopped = True
    signal.signal(signal.SIGINT, interrupt)
    sys.stdin = sys.stdin or open(os.devnull)  # None where closed
    sys.stdin.reconfigure(errors="replace")
    if sys.stdin.isatty() and not args.quiet:
        print("A line is a question. /audio FILE adds a sound, /reset forgets everything, /quit ends.", file=sys.stderr)
    shown = "> " if sys.stdin.isatty() and sys.stdout.isatty() else ""
    while True:
        try:
            waiting = True
            line, prompt = prompt or input(shown).strip(), None
            waiting = talk.stopped = False
            command, name = [*line.split(None, 1), "", ""][:2]
            if command == "/quit":
                return
            elif command == "/audio" and name:
                sounds.append(processor.waveform(os.path.expanduser(name)))
            elif command == "/reset":
                talk.forget()
                sounds = []
            elif command.startswith("/"):
                raise ValueError(f"{command} is none of /audio FILE, /reset and /quit.")
            elif line:
                say(processor, talk.answer(talk.question(line, sounds), **options), None if args.quiet else "")
                sounds = []
        except BrokenPipeError:
            raise
        except (ValueError, OSError, RuntimeError, MemoryError) as error:  # and the conversation goes on
            print(f"error: {one_line(error)}", file=sys.stderr)

# ---- Many sounds ----
SOUND_FILES = {".wav", ".mp3", ".flac", ".ogg", ".oga", ".opus", ".m4a", ".aac", ".aif", ".aiff", ".w64", ".wma", ".caf",
               ".amr", ".mp4", ".m4v", ".mkv", ".webm", ".mov", ".avi", ".ts"}  # what is taken from a folder

def read_objects(path: str) -> list[dict]:
    """The object in each line of a file of JSON lines, and {} for a line that holds none, such as one that was cut off."""
    with reading(Path(path)):
        lines = Path(path).read_text(encoding="utf-8-sig", errors="replace").split("\n")
    objects = []
    for line in filter(str.strip, lines):
        found = None
        with suppress(ValueError, RecursionError):
            found = json.loads(line)
        objects.append(found if isinstance(found, dict) else {})
    return objects

def read_jobs(prompts: str | None, names: list[str], prompt: str) -> list[dict]:
    """What is asked, in order: the lines of the file `prompts`, then each sound named or lying in a folder named."""
    jobs = [{"prompt": prompt} | job for job in (read_objects(prompts) if prompts else [])]
    for number, job in enumerate(jobs, 1):
        if not (isinstance(job.get("audio"), str) and isinstance(job["prompt"], str)) or {"answer", "error"} & job.keys():
            raise ValueError(f'{prompts}: entry {number} must be an object with "audio", a file, and no "answer" or "error".')
    for name in names:
        files = [name]
        if os.path.isdir(name):
            files = sorted(str(file) for file in Path(name).rglob("[!.]*") if file.suffix.lower() in SOUND_FILES and file.is_file())
            if not files:
                raise ValueError(f"{name}: no sound files inside.")
        jobs += [{"audio": file, "prompt": prompt} for file in files]
    return jobs

def key(job: dict) -> str:
    """A job without its outcome, to be found again by."""
    asked = {name: value for name, value in job.items() if name not in ("answer", "error")}
    return json.dumps(asked | {"audio": os.path.normpath(job["audio"])}, sort_keys=True)

def as_line(job: dict) -> str:
    """JSON in which nothing steers a terminal, and nothing is beyond what stdout can write."""
    line = json.dumps(job, ensure_ascii=sys.stdout.encoding.lower() != "utf-8")
    return line.translate({c: f"\\u{c:04x}" for c in range(127, 160)})

def leave_out_answered(jobs: list[dict], path: str) -> list[dict]:
    """The jobs that the JSON lines in `path` have no answer to."""
    answered, left = Counter(key(job) for job in read_objects(path) if "answer" in job and isinstance(job.get("audio"), str)), []
    for job in jobs:  # one that is asked twice wants two answers
        if answered[found := key(job)]:
            answered[found] -= 1
        else:
            left.append(job)
    return left

def end_cut_line(path: str) -> None:
    """Where stdout is the file `path`, a line that was cut off there is ended, so that nothing is appended to it."""
    with suppress(OSError), open(path, "rb") as file:  # OSError: stdout is no file, or this one is empty
        file.seek(-1, os.SEEK_END)
        if os.path.sameopenfile(file.fileno(), sys.stdout.fileno()) and file.read() != b"\n":
            print()

def answer_batch(batch: list[tuple[Tensor, dict]], processor: AudioFlamingo3Processor, model: nn.Module, options: dict) -> None:
    """Gives each job its "answer", or its "error": where a batch fails each is tried alone, so that none spoils another."""
    try:
        inputs = processor([plain(job["prompt"]) for _, job in batch], [sound for sound, _ in batch]).to(model.device)
        new = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1]:]
        for (_, job), text in zip(batch, processor.batch_decode(new, skip_special_tokens=True)):
            job["answer"] = text
        return
    except (ValueError, MemoryError, RuntimeError) as error:
        reason = one_line(error)
    if len(batch) == 1:
        batch[0][1]["error"] = reason
    else:
        for one in batch:  # out here, where the failed batch's tensors have left memory
            answer_batch([one], processor, model, options)

def load_sounds(jobs: list[dict], processor: AudioFlamingo3Processor) -> list[tuple[Tensor, dict]]:
    """The jobs' sounds, the shortest first; a job whose sound cannot be heard gets its "error" instead."""
    heard = []
    for job in jobs:
        try:
            with warnings.catch_warnings(record=True) as caught:
                heard.append((processor.waveform(job["audio"]), job))
            for about in map(str, (warning.message for warning in caught)):
                warnings.warn(about if job["audio"] in about else f"{job['audio']}: {about}")
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            job["error"] = one_line(error)
    return sorted(heard, key=lambda pair: len(pair[0]))

def answer_all(args: argparse.Namespace, names: list[str], prompt: str) -> None:
    """The jobs with their answers as JSON lines, in the order asked. Of each few batches' sounds, those of like length go
    together, so that little is padded; one that cannot be answered has its "error", and the rest go on.
    """
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # without a line end: what was printed are whole lines
    if (size := args.batch_size) < 1:
        raise ValueError(f"--batch-size is {size}; at least 1 is expected.")
    processor = AudioFlamingo3Processor.from_pretrained(args.model)
    asked = jobs = read_jobs(args.prompts, names, prompt)
    if args.resume and os.path.exists(args.resume):
        jobs = leave_out_answered(asked, args.resume)
        end_cut_line(args.resume)
    model, options = model_and_options(args) if jobs else (None, {})
    start, shown = time.perf_counter(), sys.stderr.isatty() and not args.quiet
    for at in range(0, len(jobs), 4 * size):
        group = jobs[at:at + 4 * size]
        heard = load_sounds(group, processor)
        for first in range(0, len(heard), size):
            answer_batch(heard[first:first + size], processor, model, options)
            if shown:
                show_progress(at + len(group) - len(heard[first + size:]), len(jobs), start)
        print("\r\x1b[K" * shown, end="", file=sys.stderr, flush=True)
        print(*map(as_line, group), sep="\n", flush=True)
    if not args.quiet:
        earlier = f" (and {len(asked) - len(jobs)} before)" if len(asked) > len(jobs) else ""
        answered = sum("answer" in job for job in jobs)
        print(f"answered {answered} of {len(jobs)}{earlier} in {time.perf_counter() - start:.1f} s", file=sys.stderr)

def show_progress(done: int, of: int, start: float) -> None:
    seconds = time.perf_counter() - start
    left = seconds / done * (of - done)
    print(f"\r{done} of {of}, {done / seconds:.2f} a second, {left:.0f} s left \x1b[K", end="", file=sys.stderr, flush=True)

# ---- The journey of a sound ----
HEAT = [16, 17, 18, 54, 90, 126, 162, 198, 203, 208, 214, 220, 226, 228, 230, 231]  # of a terminal's 256 colours
INK = " .:-=+*%@#"                                                                  # where it has none

class Journey:
    """The stages of a sound's way to its first token, in order: what came out of each, how long it took, what it means."""

    def __init__(self):
        self.rows: dict[str, list] = {}  # name -> [shape, how often, seconds, meaning]
        self.clock = time.perf_counter()

    def reach(self, name: str, shape: Iterable[int], meaning: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # or only the start of the work would be timed
        _, times, seconds, _ = self.rows.get(name, (None, 0, 0.0, None))
        self.rows[name] = [tuple(shape), times + 1, seconds + time.perf_counter() - self.clock, meaning]
        self.clock = time.perf_counter()

    def watch(self, model: AudioFlamingo3ForConditionalGeneration) -> list:
        """Hooks, to be removed, that note what the model's modules give."""
        tower, decoder = model.audio_tower, model.language_model.model
        def after(module: nn.Module, name: str, meaning: str):
            return module.register_forward_hook(lambda _, given, result: self.reach(name, result.shape, meaning))
        return [
            tower.register_forward_pre_hook(lambda *_: setattr(self, "clock", time.perf_counter())),
            after(tower.conv1, "conv1", "each mel frame with its two neighbours"),
            after(tower.conv2, "conv2", "every other one: a conv frame is 20 ms"),
            after(tower.layers[-1], f"{len(tower.layers)} encoder layers", "each conv frame has heard its whole window"),
            after(tower.layer_norm, "pool, LayerNorm", "two become one: an audio frame is 40 ms"),
            after(model.multi_modal_projector, "projector", "the real audio frames, as wide as the decoder"),
            after(decoder.embed_tokens, "embedding", "the prompt's ids, looked up"),
            decoder.register_forward_pre_hook(
                lambda _, given: self.reach("splice", given[0].shape, "each <sound> slot now holds an audio frame")),
            after(decoder.norm, f"{len(decoder.layers)} decoder layers", "each position has heard and read all before it"),
            after(model.language_model.lm_head, "lm_head", "a score for each token that may come next")]

    def table(self) -> str:
        lines = [f"{'stage':18} {'shape':20} {'ms':>9}  what it means"]
        for name, (shape, times, seconds, meaning) in self.rows.items():
            shapes = f"{shape}" + f" and {times - 1} more" * (times > 1)
            lines.append(f"{name:18} {shapes:20} {1000 * seconds:9.2f}  {meaning}")
        return "\n".join(lines)

def picture(features: Tensor, mel_frames: list[int], columns: int, coloured: bool) -> str:
    """The log-mel's real frames, low notes below, a border after each window, its audio frames under it."""
    rows, shades = (32, len(HEAT)) if coloured else (16, len(INK))
    widths = [max(1, columns * n // sum(mel_frames) - 1) for n in mel_frames]
    pooled = [F.adaptive_avg_pool2d(window[None, :, :n], (rows, width))[0].flip(0)
              for window, n, width in zip(features, mel_frames, widths)]
    low, high = min(float(w.min()) for w in pooled), max(float(w.max()) for w in pooled)
    shaded = [((w - low) / max(high - low, 1e-6) * (shades - 1)).round().int().tolist() for w in pooled]
    lines, labels = [], []
    for row in range(0, rows, 1 + coloured):
        if coloured:  # two rows a line: the upper half block's colour and the one behind it
            cells = ["".join(f"\x1b[38;5;{HEAT[a]};48;5;{HEAT[b]}m▀" for a, b in zip(w[row], w[row + 1])) + "\x1b[0m" for w in shaded]
        else:
            cells = ["".join(INK[shade] for shade in w[row]) for w in shaded]
        lines.append("|".join(["", *cells, ""]))
    for n, width in zip(mel_frames, widths):
        frames = frame_counts(n)[1]
        fitting = (label for label in (f" {frames} audio frames ", f" {frames} ", str(frames), "") if len(label) <= width)
        labels.append(next(fitting).center(width, "-"))
    return "\n".join([*lines, "|".join(["", *labels, ""])])

def explain(args: argparse.Namespace, names: list[str], prompt: str) -> None:
    """Prints this very sound's journey to the first token, its log-mel, and the answer."""
    if len(names) != 1 or os.path.isdir(names[0]):
        raise ValueError("--explain takes one sound file.")
    processor = AudioFlamingo3Processor.from_pretrained(args.model)
    journey = Journey()
    waveform = processor.waveform(names[0])
    journey.reach("waveform", waveform.shape, f"samples, {SAMPLE_RATE} a second: {len(waveform) / SAMPLE_RATE:.2f} s")
    inputs = processor(prompt, waveform)  # log-mel and ids; now each alone, for its time
    journey.clock, ids = time.perf_counter(), inputs["input_ids"]
    features, mask = feature_batch(waveform.split(N_SAMPLES))
    journey.reach("log-mel", features.shape, f"{int(mask.sum())} mel frames of 10 ms, padded to whole windows")
    processor(prompt)
    slots = int((ids == processor.audio_token_id).sum())
    journey.reach("prompt", ids.shape, f"ids in the chat template, {slots} of them <sound>")
    model, options = model_and_options(args)
    hooks, steps = journey.watch(model), model.stream(**inputs.to(model.device), **options)
    first = next(steps)
    for hook in hooks:
        hook.remove()
    journey.reach("next token", first.shape, f"{processor.decode(first)!r}; then token by token")
    coloured = sys.stdout.isatty() and "256color" in os.environ.get("TERM", "") and "NO_COLOR" not in os.environ
    coloured, columns = coloured and sys.stdout.encoding.lower() == "utf-8", min(shutil.get_terminal_size().columns - 1, 400)
    print(journey.table(), picture(features, mask.sum(1).tolist(), columns, coloured), sep="\n\n", end="\n\n")
    say(processor, chain([first], steps), None)

# ---- The command line ----
def main() -> None:
    parser = make_parser()
    add = parser.add_argument
    add("more", nargs="*", help="further sounds, and folders of them; a last word that is no file is the prompt")
    add("-h", "--help", action="help", help="shows this")
    way = parser.add_mutually_exclusive_group().add_argument
    way("--chat", action="store_true", help="a conversation in the terminal, in which no sound is heard twice")
    way("--explain", action="store_true", help="the sound's journey to its answer as a table and a picture, and the answer")
    way("--prompts", metavar="FILE", help='JSON lines with "audio", "prompt" and any other fields, which stay')
    add("--batch-size", type=int, default=8, metavar="N", help="of many sounds, answer N at a time (default: 8)")
    add("--resume", metavar="FILE", help="leave out what an earlier run, `>> FILE`, has answered")
    args = parser.parse_intermixed_args()
    words = [word for word in (args.audio, args.prompt, *args.more) if word is not None]
    prompt = None
    if len(words) > (0 if args.prompts else 1) and not os.path.exists(words[-1]):
        if " " in words[-1] or Path(words[-1]).suffix.lower() not in SOUND_FILES:  # not a mistyped file
            prompt = words.pop()
    if not (words or args.chat or args.prompts):
        parser.error("the following arguments are required: audio")
    try:
        if args.chat:
            chat(args, words, prompt)
        else:
            prompt = AudioFlamingo3Processor.default_transcription_prompt if prompt is None else plain(prompt)
            (explain if args.explain else answer_all)(args, words, prompt)
    except KeyboardInterrupt:
        os._exit(os.write(1, b"\n") and 130)
    except EOFError:  # the end of the input ends a conversation
        print(end="\n" * sys.stdin.isatty())
