"""Text in, windows of tokens out."""

from shearling.data.sampled import sampled_windows
from shearling.data.text import corpus_tokens, read_texts
from shearling.data.windows import tokens_digest, windows

__all__ = ["corpus_tokens", "read_texts", "sampled_windows", "tokens_digest", "windows"]
