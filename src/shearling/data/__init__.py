"""Text in, windows of tokens out."""

from shearling.data.domains import Domains
from shearling.data.references import read_references
from shearling.data.sampled import sampled_windows
from shearling.data.shards import PackedTokens, PackedWindows, is_packed, pack
from shearling.data.text import corpus_tokens, read_texts
from shearling.data.windows import MemoryWindows, Windows, spread, tokens_digest, windows

__all__ = [
    "Domains",
    "MemoryWindows",
    "PackedTokens",
    "PackedWindows",
    "Windows",
    "corpus_tokens",
    "is_packed",
    "pack",
    "read_references",
    "read_texts",
    "sampled_windows",
    "spread",
    "tokens_digest",
    "windows",
]
