"""tokenizer.json and tokenizer_config.json: what is in them, and whether it fits the model."""

from pathlib import Path

from plumbing.json_file import errors_naming, read_json


def read_tokenizer(folder: Path) -> dict:
    """The contents of tokenizer.json and tokenizer_config.json that define the tokenizer."""
    path = folder / "tokenizer.json"
    content = read_json(path)
    with errors_naming(path):
        check_merges(content["model"]["merges"], content["model"]["vocab"])
        added_tokens = {token["content"]: token["id"] for token in content["added_tokens"]}
        check_ids(content["model"]["vocab"], added_tokens)
        special_tokens = [token for token in content["added_tokens"] if token["special"]]
        pattern = content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    return {
        "vocabulary": content["model"]["vocab"],  # the byte-level BPE's tokens and ids
        "pattern": pattern,  # splits text before the BPE
        "added_tokens": added_tokens,
        "special_ids": {token["id"] for token in special_tokens},
        **read_named_ids(folder, added_tokens),
    }


def read_token_ids(folder: Path) -> dict[str, int]:
    """The id of every token in tokenizer.json."""
    path = folder / "tokenizer.json"
    tokenizer = read_json(path)
    with errors_naming(path):
        added_tokens = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
        vocabulary = tokenizer["model"]["vocab"]
        check_ids(vocabulary, added_tokens)
        return vocabulary | added_tokens


def read_named_ids(folder: Path, token_ids: dict[str, int]) -> dict[str, int]:
    """pad_token_id and eos_token_id, from the tokens in tokenizer_config.json."""
    path = folder / "tokenizer_config.json"
    config = read_json(path)
    named_ids = {}
    for key in ("pad_token", "eos_token"):
        token = config.get(key)
        if isinstance(token, dict):  # older files have an object here
            token = token.get("content")
        check_named_token(key, token, token_ids, path)
        named_ids[f"{key}_id"] = token_ids[token]
    return named_ids


# ---- Checks ----


def check_merges(merges: list, vocabulary: dict[str, int]) -> None:
    """tiktoken uses ids as ranks, so the merge of rank i must make the token 256 + i."""
    for rank, merge in enumerate(merges):
        first, second = merge.split(" ") if isinstance(merge, str) else merge
        if vocabulary.get(first + second) != 256 + rank:
            raise ValueError(f"merge {rank} does not make token {256 + rank}.")


def check_ids(vocabulary: dict[str, int], added_tokens: dict[str, int]) -> None:
    """Each id belongs to one token, and each byte has a token; otherwise tiktoken would crash."""
    token_ids = vocabulary | added_tokens
    token_of = {token_id: token for token, token_id in token_ids.items()}
    for token, token_id in token_ids.items():
        if token_of[token_id] != token:
            raise ValueError(f"{token!r} and {token_of[token_id]!r} have the same id, {token_id}.")
    num_bytes = sum(len(token) == 1 for token in vocabulary)
    if num_bytes < 256:
        raise ValueError(f"only {num_bytes} of the 256 bytes have a token.")


def check_named_token(key: str, token, token_ids: dict[str, int], path: Path) -> None:
    """Refuses a tokenizer without the token in its configuration, or without the model's own."""
    needed = [token, "<sound>", "<|im_start|>", "<|im_end|>"]
    if not isinstance(token, str) or not all(name in token_ids for name in needed):
        raise ValueError(
            f"{path}: {key} is {token!r}; tokenizer.json beside it must have that token, "
            "<sound>, <|im_start|> and <|im_end|>."
        )
