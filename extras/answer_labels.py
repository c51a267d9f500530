"""Labels for fine-tuning: only what the assistant says, and the end of its turn.

`processor(..., output_labels="answer")` calls this.
"""

import torch
from torch import Tensor


def keep_answers(batch: dict[str, Tensor], processor) -> None:
    """Sets the labels (B, T) of a batch to -100 everywhere but on the assistant's words."""
    is_answer = torch.stack([answer_mask(ids, processor) for ids in batch["input_ids"]])
    batch["labels"] = batch["labels"].masked_fill(~is_answer, -100)


def answer_mask(ids: Tensor, processor) -> Tensor:
    """(T,) bool: True where ids (T,) are an assistant's words, or the <|im_end|> after them."""
    tokenizer = processor.tokenizer
    header = tokenizer.encode("assistant\n")
    is_answer = torch.zeros(len(ids), dtype=torch.bool)
    ends = (ids == processor.end_id).nonzero()[:, 0]
    for start in (ids == processor.start_id).nonzero()[:, 0].tolist():
        later_ends = ends[ends > start]
        if len(later_ends) == 0:
            break  # the generation prompt, which has no words yet
        end = int(later_ends[0])
        turn = ids[start + 1 : end + 1].tolist()
        if tokenizer.decode(turn).startswith("assistant\n"):
            first = start + 1 + len(header)
            if turn[: len(header)] != header:
                first -= 1  # the header's newline and the answer's first ones are one token
            is_answer[first : end + 1] = True
    return is_answer
