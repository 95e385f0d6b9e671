"""Text in, windows of tokens out."""

from shearling.data.text import corpus_tokens, read_texts
from shearling.data.windows import tokens_digest, windows

__all__ = ["corpus_tokens", "read_texts", "tokens_digest", "windows"]
