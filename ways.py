"""More ways to use Audio Flamingo 3 than one sound and one answer. Nobody needs this file to understand the model.

A conversation (--chat), an answer to each of many sounds (several files, folders, --prompts), and one sound's journey to
its answer as a table and a picture (--explain). generate.py hands over to `main` whatever is not one sound and a prompt.
"""
import argparse
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import processor as words_and_sounds
from af3 import AudioFlamingo3ForConditionalGeneration, KeyValueCache, frame_counts
from generate import make_parser, model_and_options, one_line, say
from load_weights import model_name, read_json, reading
from processor import SAMPLE_RATE, AudioFlamingo3Processor, Batch

SOUND_FILES = {".wav", ".mp3", ".flac", ".ogg", ".oga", ".opus", ".m4a", ".aac", ".aif", ".aiff", ".w64", ".wma", ".caf",
               ".amr", ".mp4", ".m4v", ".mkv", ".webm", ".mov", ".avi", ".ts"}  # what is taken from a folder
HEAT = [16, 17, 18, 54, 90, 126, 162, 198, 203, 208, 214, 220, 226, 228, 230, 231]  # of a terminal's 256 colours, dark to bright
INK = " .:-=+*%@#"                                                                  # where it has none

def plain(prompt: str) -> str:
    """The prompt, unless the processor would take it for a finished template."""
    if prompt.startswith("<|im_start|>"):
        raise ValueError("The prompt starts with <|im_start|>; ask in plain words.")
    return prompt

# ---- Thinking ----
def merge_adapter(model: nn.Module, folder: Path, dtype: torch.dtype) -> None:
    """Merges AF-Think's LoRA (Hu et al. 2021) into the weights, in float32, and puts what was trained beside it in place.
    A tensor of the adapter that finds no place is an error that names it.
    """
    adapter = folder / ("stage35" if (folder / "stage35").is_dir() else "think")
    with reading(path := adapter / "adapter_config.json"):
        config = read_json(path)
        alpha, root = float(config["lora_alpha"]), 0.5 if config.get("use_rslora") else 1.0
        if config.get("alpha_pattern"):
            raise ValueError(f"{path}: alpha_pattern is not supported.")
    with reading(path := adapter / "adapter_model.safetensors"):
        given = load_file(path)
    with reading(path := adapter / "non_lora_trainables.bin"):
        given |= torch.load(path, map_location="cpu", weights_only=True)
    tensors = {model_name(name): tensor for name, tensor in given.items()}
    for name, weight in model.state_dict().items():
        factors = [name.removesuffix("weight") + f"lora_{factor}.weight" for factor in "AB"]
        if tensors.keys() >= {*factors}:
            a, b = (tensors.pop(factor).float() for factor in factors)  # (r, in), (out, r)
            tensors[name] = torch.addmm(tensors.get(name, weight).float(), b, a, alpha=alpha / len(a) ** root).to(dtype)
    unplaced = model.load_state_dict(tensors, strict=False, assign=True).unexpected_keys
    if named := [name for name in given if model_name(name) in unplaced]:
        raise ValueError(f"{adapter}: no place in the model for {', '.join(named)}.")

# ---- A conversation ----
class Conversation:
    """Turns that share one key-value cache: no sound is heard twice, and a turn costs what is new in it."""

    def __init__(self, processor: AudioFlamingo3Processor, model: AudioFlamingo3ForConditionalGeneration):
        config = model.config.text_config
        self.processor, self.model, self.stopped = processor, model, True
        self.cache = KeyValueCache(config, 1, config.max_position_embeddings, model.dtype, model.device)
        self.unfed: list[int] = []  # the end of the last turn, which the cache does not hold yet

    def question(self, text: str, sounds: Iterable = ()) -> Batch:
        """The model's inputs for a user turn: the end of the turn before, this one, and the header of the answer."""
        content = [*({"type": "audio", "audio": sound} for sound in sounds), {"type": "text", "text": text}]
        system = [{"role": "system", "content": None}] if self.unfed else []  # only the first turn has the opening before it
        batch = self.processor.apply_chat_template([*system, {"role": "user", "content": content}], add_generation_prompt=True)
        batch["input_ids"] = torch.cat([torch.tensor([self.unfed], dtype=torch.long), batch["input_ids"]], dim=1)
        del batch["attention_mask"]  # all ones
        return batch.to(self.model.device)

    def answer(self, question: Batch, **options) -> Iterator[torch.Tensor]:
        """The answer's ids, each (1,), as soon as they are known; setting `stopped` ends it early. Options as `generate`'s."""
        self.stopped = False
        try:
            for ids in self.model.stream(**question, cache=self.cache, **options):
                last = [id for id in ids.tolist() if id not in self.processor.tokenizer.special]
                self.unfed = [*last, self.processor.end, *self.processor.tokenizer.encode("\n")]
                yield ids
                if self.stopped:
                    return
        finally:
            self.stopped = True

def chat(args: argparse.Namespace, audio: list[str], prompt: str | None) -> None:
    """A conversation in the terminal: a line is a question. Ctrl-C ends an answer, and where none is given the conversation."""
    with suppress(ImportError):  # not on Windows
        import readline  # noqa: F401  with it input() has a history
    processor = AudioFlamingo3Processor.from_pretrained(args.model)
    sounds = [processor.waveform(name, name) for name in audio]
    model, options = model_and_options(args)
    talk = Conversation(processor, model)
    def interrupt(*_) -> None:
        if talk.stopped:
            os._exit(os.write(1, b"\n") and 130)
        talk.stopped = True
    signal.signal(signal.SIGINT, interrupt)
    if sys.stdin.isatty() and not args.quiet:
        print("A line is a question. /audio FILE adds a sound, /reset forgets everything, /quit ends.", file=sys.stderr)
    while (line := prompt or read_line()) != "/quit":
        prompt, (command, _, name) = None, line.partition(" ")
        try:
            if command == "/audio":
                sounds.append(processor.waveform(Path(name.strip()).expanduser(), name))
            elif command == "/reset":
                talk, sounds = Conversation(processor, model), []
            elif command.startswith("/"):
                raise ValueError(f"{command} is none of /audio FILE, /reset and /quit.")
            elif line:
                question, sounds = talk.question(line, sounds), []
                say(processor, talk.answer(question, **options), None if args.quiet else "")
        except (ValueError, FileNotFoundError, PermissionError) as error:
            print(f"error: {one_line(error)}", file=sys.stderr)

def read_line() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return "/quit"

# ---- Many sounds ----
def read_objects(path: str) -> list[dict]:
    """The object in each line of a file of JSON lines; an empty one for a line that holds none, such as one cut off."""
    with reading(Path(path)):
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    return [as_object(line) for line in lines if line.strip()]

def as_object(line: str) -> dict:
    with suppress(ValueError, TypeError):
        return {**json.loads(line)}
    return {}

def read_jobs(prompts: str | None, names: list[str], prompt: str) -> list[dict]:
    """What is asked, in order: the lines of the file `prompts`, then each sound named or lying in a folder named."""
    jobs = [{"prompt": prompt} | job for job in (read_objects(prompts) if prompts else [])]
    for number, job in enumerate(jobs, 1):
        if not (isinstance(job.get("audio"), str) and isinstance(job["prompt"], str)) or {"answer", "error"} & job.keys():
            raise ValueError(f'{prompts}: entry {number} must be a JSON object with "audio", a file, and without "answer", "error".')
    for name in names:
        inside = sorted(str(file) for file in Path(name).rglob("*") if file.suffix.lower() in SOUND_FILES)
        if os.path.isdir(name) and not inside:
            raise ValueError(f"{name}: no sound files inside.")
        jobs += [{"audio": file, "prompt": prompt} for file in inside or [name]]
    return jobs

def key(job: dict) -> str:
    """A job without its outcome, to be found again by."""
    return json.dumps({name: value for name, value in job.items() if name not in ("answer", "error")}, sort_keys=True)

def answer_batch(batch: list[tuple[torch.Tensor, dict]], processor: AudioFlamingo3Processor, model: nn.Module, options: dict) -> None:
    """Gives each job its "answer", or its "error": where a batch fails each is tried alone, so that none spoils another."""
    try:
        inputs = processor([plain(job["prompt"]) for _, job in batch], [sound for sound, _ in batch]).to(model.device)
        new = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1]:]
        for (_, job), text in zip(batch, processor.batch_decode(new, skip_special_tokens=True)):
            job["answer"] = text
    except (ValueError, MemoryError, RuntimeError) as error:
        if len(batch) == 1:
            batch[0][1]["error"] = one_line(error)
        else:
            for one in batch:
                answer_batch([one], processor, model, options)

def answer_all(args: argparse.Namespace, names: list[str], prompt: str | None) -> None:
    """The jobs with their answers as JSON lines, in the order asked. Of each few batches' sounds, those of like length go
    together, so that little is padded; one that cannot be answered has its "error", and the rest go on.
    """
    if args.batch_size < 1:
        raise ValueError(f"--batch-size is {args.batch_size}; at least 1 is expected.")
    processor = AudioFlamingo3Processor.from_pretrained(args.model)
    jobs = read_jobs(args.prompts, names, prompt or processor.default_transcription_prompt)
    if args.resume and os.path.exists(args.resume):
        done = {key(job) for job in read_objects(args.resume) if "answer" in job}
        jobs = [job for job in jobs if key(job) not in done]
        if Path(args.resume).read_bytes()[-1:] not in (b"", b"\n"):
            print()  # what is appended there must not go on the line that was cut off
    model, options = model_and_options(args)
    start, shown = time.perf_counter(), sys.stderr.isatty() and not args.quiet
    for at in range(0, len(jobs), 4 * args.batch_size):
        some, heard = jobs[at:at + 4 * args.batch_size], []
        for job in some:
            try:
                heard.append((processor.waveform(job["audio"], job["audio"]), job))
            except (ValueError, OSError) as error:
                job["error"] = one_line(error)
        heard.sort(key=lambda pair: len(pair[0]))
        for first in range(0, len(heard), args.batch_size):
            answer_batch(heard[first:first + args.batch_size], processor, model, options)
            if shown:
                count = at + len(some) - len(heard) + min(first + args.batch_size, len(heard))
                rate = count / (time.perf_counter() - start)
                left = (len(jobs) - count) / rate
                print(f"\r{count} of {len(jobs)}, {rate:.2f} a second, {left:.0f} s left ", end="", file=sys.stderr, flush=True)
        print("\r\x1b[K" * shown, end="", file=sys.stderr, flush=True)
        for job in some:
            print(json.dumps(job, ensure_ascii=sys.stdout.encoding.lower() != "utf-8"), flush=True)
    if not args.quiet:
        wrong, seconds = sum("error" in job for job in jobs), time.perf_counter() - start
        print(f"answered {len(jobs) - wrong} of {len(jobs)} in {seconds:.1f} s", file=sys.stderr)

# ---- The journey of a sound ----
class Journey:
    """The stages of a sound's way to its first token, in order: what came out of each, how long it took, what it means."""

    def __init__(self):
        self.rows: dict[str, list] = {}  # name -> [shape, how often, seconds, meaning]
        self.clock = time.perf_counter()

    def reach(self, name: str, shape: Iterable[int], meaning: str) -> None:
        now = time.perf_counter()
        _, times, seconds, _ = self.rows.get(name, (None, 0, 0.0, None))
        self.rows[name] = [tuple(shape), times + 1, seconds + now - self.clock, meaning]
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

def picture(features: torch.Tensor, mel_frames: list[int], columns: int, coloured: bool) -> str:
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

def explain(args: argparse.Namespace, names: list[str], prompt: str | None) -> None:
    """Prints this very sound's journey to the first token, its log-mel, and the answer."""
    if len(names) != 1 or os.path.isdir(names[0]):
        raise ValueError("--explain takes one sound file.")
    processor = AudioFlamingo3Processor.from_pretrained(args.model)
    journey = Journey()
    waveform = processor.waveform(names[0], names[0])
    journey.reach("waveform", waveform.shape, f"samples, {SAMPLE_RATE} a second: {len(waveform) / SAMPLE_RATE:.2f} s")
    def features(windows: list[torch.Tensor], make=words_and_sounds.feature_batch) -> tuple[torch.Tensor, torch.Tensor]:
        journey.reach("prompt", (), "")
        made = make(windows)
        journey.reach("log-mel", made[0].shape, f"{int(made[1].sum())} mel frames of 10 ms, padded to whole windows")
        return made
    with patch.object(words_and_sounds, "feature_batch", features):
        inputs = processor.apply_transcription_request(waveform, prompt)
    ids, mel_frames = inputs["input_ids"], inputs["feature_attention_mask"].sum(1).tolist()
    slots = int((ids == processor.audio_token_id).sum())
    journey.rows["prompt"][::3] = tuple(ids.shape), f"ids in the chat template, {slots} of them <sound>"
    model, options = model_and_options(args)
    hooks, steps = journey.watch(model), model.stream(**inputs.to(model.device), **options)
    first = next(steps)
    for hook in hooks:
        hook.remove()
    journey.reach("next token", first.shape, f"{processor.decode(first)!r}; then token by token")
    coloured = sys.stdout.isatty() and "256color" in os.environ.get("TERM", "") and "NO_COLOR" not in os.environ
    columns = shutil.get_terminal_size().columns - 1
    print(journey.table(), picture(inputs["input_features"], mel_frames, columns, coloured), "", sep="\n\n")
    say(processor, chain([first], steps), None)

def main() -> None:
    parser = make_parser()
    add = parser.add_argument
    add("more", nargs="*", help="further sounds, and folders of them: then a last word that is no file is the prompt")
    add("-h", "--help", action="help", help="shows this")
    add("--chat", action="store_true", help="a conversation in the terminal, in which no sound is heard twice")
    add("--explain", action="store_true", help="the sound's journey to its answer as a table and a picture, and the answer")
    add("--prompts", metavar="FILE", help='JSON lines with "audio", "prompt" and any other fields, which stay')
    add("--batch-size", type=int, default=8, metavar="N", help="answer N sounds at a time (default: 8)")
    add("--resume", metavar="FILE", help="leave out what FILE, JSON lines of an earlier run, has an answer to")
    args = parser.parse_intermixed_args()
    words = [word for word in (args.audio, args.prompt, *args.more) if word is not None]
    has_prompt = len(words) > (0 if args.prompts else 1) and not os.path.exists(words[-1])
    prompt = words.pop() if has_prompt else None
    if not (words or args.chat or args.prompts):
        parser.error("the following arguments are required: audio")
    plain(prompt or "")
    (chat if args.chat else explain if args.explain else answer_all)(args, words, prompt)
