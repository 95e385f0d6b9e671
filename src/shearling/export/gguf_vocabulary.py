"""A fast tokenizer as GGUF metadata: byte-level BPE under llama.cpp's name of its splitting, or SentencePiece's BPE."""

from __future__ import annotations

import json
from typing import Any

from shearling.errors import ShearlingError

#: llama.cpp's token types (``llama_token_type``)
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
#: how text is split before merging: the steps of tokenizer.json -> llama.cpp's name
_SPLITTING = {
    ("ByteLevel regex",): "gpt-2",
    ("Digits each", "ByteLevel regex"): "smollm",
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+",
        "ByteLevel",
    ): "llama-bpe",
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+",
        "ByteLevel",
    ): "qwen2",
}


def add_vocabulary(writer: Any, tokenizer: Any, size: int) -> None:
    """Add tokens, merges, special tokens and the chat template to a ``gguf.GGUFWriter``, ``size`` tokens in all.

    Raises ShearlingError for a tokenizer that llama.cpp has no rules for.
    """
    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
        return
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ShearlingError("GGUF: the tokenizer has no tokenizer.json; save it as a fast tokenizer first")
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    model, vocabulary = content["model"], tokenizer.get_vocab()
    if model["type"] != "BPE":
        raise ShearlingError(f"GGUF: a tokenizer of type {model['type']} is not written; BPE is")
    if not model["merges"]:
        raise ShearlingError("GGUF: the tokenizer merges nothing, and llama.cpp loads no vocabulary without merges")
    if len(vocabulary) > size:
        raise ShearlingError(f"GGUF: the tokenizer has {len(vocabulary)} tokens, the model {size}; use the model's own")
    tokens = [f"[PAD{index}]" for index in range(size)]
    types = [_UNUSED] * size
    for token, index in vocabulary.items():
        tokens[index], types[index] = token, _NORMAL
    for added in content["added_tokens"]:
        types[added["id"]] = _CONTROL if added["special"] else _USER
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if model.get("byte_fallback"):
        _add_sentencepiece(writer, content, tokens, types, merges)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_splitting(content))
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_merges(merges)
    for kind in ("bos", "eos", "unk", "pad"):
        index = getattr(tokenizer, f"{kind}_token_id", None)
        if index is not None:
            getattr(writer, f"add_{kind}_token_id")(index)
    begins = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id] and tokenizer.bos_token_id is not None
    writer.add_add_bos_token(begins)
    if isinstance(template := getattr(tokenizer, "chat_template", None), str):
        writer.add_chat_template(template)


def _splitting(content: dict[str, Any]) -> str:
    step = content["pre_tokenizer"] or {}
    steps = tuple(_describe(part) for part in step.get("pretokenizers", [step]))
    if steps not in _SPLITTING or content["normalizer"] not in (None, {"type": "NFC"}):
        known = ", ".join(_SPLITTING.values())
        raise ShearlingError(f"GGUF: the tokenizer splits text in a way without a name ({known} have one); export onnx")
    return _SPLITTING[steps]


def _describe(step: dict[str, Any]) -> str:
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": regex}:
            return "ByteLevel regex" if regex else "ByteLevel"
        case {"type": "Digits", "individual_digits": True}:
            return "Digits each"
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
            return pattern
    return json.dumps(step)


def _add_sentencepiece(
    writer: Any, content: dict[str, Any], tokens: list[str], types: list[int], merges: list[str]
) -> None:
    """llama.cpp joins the pair whose token scores highest: earlier merges score higher."""
    spaced = json.dumps([content["normalizer"], content["pre_tokenizer"]], ensure_ascii=False)
    if "\u2581" not in spaced:
        raise ShearlingError(
            "GGUF: the tokenizer falls back to bytes but marks no spaces; only SentencePiece's are written"
        )
    rank: dict[str, int] = {}
    for position, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", ""), position)
    # a token that no merge makes is met as one character only
    scores = [-float(rank.get(token, len(merges))) for token in tokens]
    for index, token in enumerate(tokens):
        if types[index] == _NORMAL and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            types[index] = _BYTE
        if token == content["model"].get("unk_token"):
            types[index] = _UNKNOWN
    prefix = '"Prepend"' in spaced or '"prepend_scheme": "first"' in spaced or '"prepend_scheme": "always"' in spaced
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_add_space_prefix(prefix)
