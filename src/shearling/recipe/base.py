"""What all parts of a recipe share."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

STDLIB = "stdlib:"
RECOVERY_TEXT = "stdlib:recovery"
SOURCE = "source"
UNSTRUCTURED = "unstructured"
TOP_K = 64
Tokens = Annotated[int, Field(ge=1)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
