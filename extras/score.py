"""Scores answers: JSON lines with the right "answer" and the model's "response".

    python generate.py --prompts questions.jsonl --output answers.jsonl
    python -m extras.score answers.jsonl
    python -m extras.score answers.jsonl --by task --json

A line that has an "error" instead of a response counts as an empty response.

exact   The share of lines whose response equals the answer after normalization: NFKC, lowercase,
        no apostrophes ("don't" becomes "dont"), every other character that is not a letter, digit
        or mark replaced by a space, single spaces.
        The model's introduction to a transcription is removed from the response first, as by
        `processor.decode(..., strip_prefix=True)`.
wer     Word error rate: the minimum number of word insertions, deletions and substitutions that
        turn the answer into the response, both normalized, summed over lines; divided by the
        number of words in the answers. Multiple-choice lines do not count here.
choice  The share of multiple-choice lines with the right letter. A multiple-choice line has
        "choices", or a prompt that lists "(A) ... (B) ..."; (AA) follows (Z). The first of these
        rules that applies gives the chosen letter:
          1. "(B)", alone or at the beginning; but not if another such letter follows
          2. the text of a choice, after normalization
          3. "B", alone or before ".", ")" or ":"
          4. "answer is B", "answer: (B)", "option B" or "choice B", anywhere; the last one counts
          5. the only choice whose text is in the response, as whole words
        Otherwise no letter is chosen, which is wrong. The same rules give the right letter from
        the answer.

Each figure is followed by its 95% confidence interval: Wilson's for a share; a bootstrap for the
word error rate, the middle 95% of 1000 samples of as many lines, drawn with replacement.
"""

import argparse
import json
import re
import sys
import unicodedata
from dataclasses import dataclass

import numpy as np

from extras.many_recordings import choice_letter, read_entries
from plumbing import terminal
from plumbing.transcription_prefix import strip_transcription_prefix

# ---- Words ----


def normalize(text: str) -> str:
    """Normalizes text for comparison, by the rules at the top of this file."""
    text = unicodedata.normalize("NFKC", text).lower()
    text = re.sub("['’]", "", text)
    characters = []
    for character in text:
        kind = unicodedata.category(character)[0]  # L letter, N number, M mark, ...
        characters.append(character if kind in "LNM" else " ")
    return " ".join("".join(characters).split())


def word_errors(response: str, answer: str) -> int:
    """The fewest insertions, deletions and substitutions of words from one to the other."""
    words = response.split()
    # From the words of `answer` so far to each prefix of `words`.
    distances = list(range(len(words) + 1))
    for count, answer_word in enumerate(answer.split(), start=1):
        diagonal = distances[0]
        distances[0] = count
        for j, word in enumerate(words, start=1):
            substituted = diagonal + (word != answer_word)
            diagonal = distances[j]
            distances[j] = min(distances[j] + 1, distances[j - 1] + 1, substituted)
    return distances[-1]


# ---- Multiple choice ----


def find_choices(entry: dict) -> list[str]:
    """The texts of the choices, in order, from the field "choices" or from the prompt."""
    if entry.get("choices"):
        return entry["choices"]
    parts = re.split(r"\(([A-Z]+)\)", str(entry.get("prompt", "")))
    texts = []
    for letter, text in zip(parts[1::2], parts[2::2]):
        if letter == choice_letter(len(texts)):
            texts.append(text)
        elif len(letter) == 1:
            return []
        elif texts:  # in the text of a choice, for example "(US)"
            texts[-1] += f"({letter}){text}"
    return [text.strip() for text in texts] if len(texts) > 1 else []


def chosen_letter(text: str, choices: list[str]) -> str | None:
    """The letter of the choice given in a text, by the rules at the top of this file."""
    letters = [choice_letter(number) for number in range(len(choices))]
    any_letter = "|".join(letters)
    text = text.strip()
    normal = normalize(text)
    normal_choices = [normalize(choice) for choice in choices]

    in_brackets = re.findall(rf"\(({any_letter})\)", text)
    if in_brackets and text.startswith("("):
        return in_brackets[0] if len(set(in_brackets)) == 1 else None
    if normal_choices.count(normal) == 1:
        return letters[normal_choices.index(normal)]
    alone = re.match(rf"({any_letter})($|[.):])", text)
    if alone:
        return alone[1]
    named = re.findall(rf"(?i:answer is|answer:|option|choice) *\(?({any_letter})\b", text)
    if named:
        return named[-1]
    contained = []
    for letter, choice in zip(letters, normal_choices):
        if choice and f" {choice} " in f" {normal} ":
            contained.append(letter)
    return contained[0] if len(contained) == 1 else None


# ---- Figures ----


@dataclass
class Outcome:
    """The score of a line. `choice` is None if it is not a multiple-choice line."""

    exact: bool
    errors: int  # in words
    words: int  # of the answer
    choice: bool | None


def score_line(entry, place: str) -> Outcome:
    check_line(entry, place)
    choices = find_choices(entry)
    response = entry.get("response", "")
    choice = None
    if choices:
        right = chosen_letter(entry["answer"], choices)
        if right is None:
            raise ValueError(f'{place}: its "answer" is not one of its choices.')
        choice = chosen_letter(response, choices) == right
    response = normalize(strip_transcription_prefix(response))
    answer = normalize(entry["answer"])
    errors = word_errors(response, answer)
    return Outcome(response == answer, errors, len(answer.split()), choice)


def summarize(outcomes: list[Outcome]) -> dict:
    """{"lines": ..., "exact": [share, low, high], "wer": [...], "choice": [...]}, or None."""
    open_ended = [outcome for outcome in outcomes if outcome.choice is None]
    choices = [outcome.choice for outcome in outcomes if outcome.choice is not None]
    return {
        "lines": len(outcomes),
        "exact": share([outcome.exact for outcome in outcomes]),
        "wer": word_error_rate(open_ended),
        "choice": share(choices),
    }


def share(outcomes: list[bool]) -> list[float] | None:
    """The share of true outcomes and the ends of its Wilson interval."""
    n = len(outcomes)
    if n == 0:
        return None
    z = 1.959964  # 95% of a normal distribution lie within this many standard deviations
    p = sum(outcomes) / n
    center = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
    return [p, max(0.0, center - half), min(1.0, center + half)]


def word_error_rate(outcomes: list[Outcome]) -> list[float] | None:
    """The word error rate and the ends of its bootstrap interval, the same in every run."""
    errors = np.array([outcome.errors for outcome in outcomes])
    words = np.array([outcome.words for outcome in outcomes])
    if words.sum() == 0:
        return None
    rng = np.random.default_rng(0)
    rates = []
    for _ in range(1000):
        drawn = rng.integers(len(words), size=len(words))
        rates.append(errors[drawn].sum() / max(1, words[drawn].sum()))
    low, high = np.quantile(rates, [0.025, 0.975])
    return [float(errors.sum() / words.sum()), float(low), float(high)]


def score_file(path: str, by: str | None = None) -> dict[str, dict]:
    """The figures for all lines, under "all", and for each value of the field `by`.

    Raises ValueError, with the line's number, if a line cannot be scored.
    """
    groups = {"all": []}
    for place, entry in read_entries(path):
        outcome = score_line(entry, place)
        groups["all"].append(outcome)
        if by is not None:
            if by not in entry:
                raise ValueError(f'{place}: it has no "{by}".')
            groups.setdefault(f"{by}={entry[by]}", []).append(outcome)
    return {name: summarize(outcomes) for name, outcomes in groups.items()}


def check_line(entry, place: str) -> None:
    if not isinstance(entry, dict):
        raise ValueError(f"{place}: a JSON object is expected.")
    if not isinstance(entry.get("answer"), str):
        raise ValueError(f'{place}: "answer" is {json.dumps(entry.get("answer"))}; text expected.')
    if "response" not in entry and "error" not in entry:
        raise ValueError(f'{place}: it has no "response"; ask with generate.py --prompts first.')
    if not isinstance(entry.get("response", ""), str):
        raise ValueError(f'{place}: "response" is {json.dumps(entry["response"])}; text expected.')
    choices = entry.get("choices") or []
    if not isinstance(choices, list) or not all(isinstance(text, str) for text in choices):
        raise ValueError(f'{place}: "choices" is {json.dumps(choices)}; a list of texts expected.')


# ---- The command line ----


def table(figures: dict[str, dict]) -> str:
    labels = [terminal.one_line(name) for name in figures]
    width = max(len(label) for label in labels)
    rows = [f"{'':{width}}  {'lines':>6}  {'exact':^20}  {'wer':^20}  {'choice':^20}".rstrip()]
    for label, row in zip(labels, figures.values()):
        cells = [in_percent(row[column]) for column in ("exact", "wer", "choice")]
        line = f"{label:{width}}  {row['lines']:6}  " + "  ".join(f"{cell:^20}" for cell in cells)
        rows.append(line.rstrip())
    return "\n".join(rows)


def in_percent(figure: list[float] | None) -> str:
    """Formats a figure, for example "97.3% (94.8 to 98.6)"."""
    if figure is None:
        return "-"
    value, low, high = [100 * number for number in figure]
    return f"{value:.1f}% ({low:.1f} to {high:.1f})"


def main() -> int:
    """Returns 0, or 2 for bad input, after one line `error: ...`."""
    terminal.prepare_streams()
    parser = argparse.ArgumentParser(
        prog="python -m extras.score",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error = terminal.refuse
    parser.add_argument("lines", metavar="answers.jsonl", help="- is standard input")
    parser.add_argument("--by", metavar="FIELD", help="also for each value of this field")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    try:
        args = parser.parse_args()
        figures = score_file(args.lines, args.by)
    except (ValueError, OSError) as error:
        terminal.print_error(error)
        return 2
    text = json.dumps(figures, indent=1) if args.json else table(figures)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
