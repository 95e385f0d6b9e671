"""What a short supervised fine-tune makes of a model: loss of held-out responses before and after."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from common import Rows

from shearling.data import windows
from shearling.evaluate.tasks.likelihood import log_likelihoods
from shearling.train import TrainSettings, train

Pair = tuple[str, str]
EPOCHS = 3


def instruction_pairs(file: Path) -> tuple[list[Pair], list[Pair]]:
    """Prompts with their responses, of a JSONL file of questions and answers: the first four fifths, and the rest."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    pairs = [(f"Question: {row['question']}\nAnswer:", f" {row['answer']}") for row in rows]
    count = len(pairs) * 4 // 5
    return pairs[:count], pairs[count:]


class Instructions:
    """Fine-tunes copies of models, all alike: the same windows in the same order, documents apart.

    Prompts are trained on too, but only responses are scored, in nats a token. ``small`` takes a few pairs and steps.
    """

    def __init__(self, file: Path, tokenizer: Any, *, learning_rate: float, small: bool, gpu: bool) -> None:
        train_on, held_out = instruction_pairs(file)
        self.tokenizer, self.batch = tokenizer, 4 if small else 32
        self.held_out = held_out[:8] if small else held_out
        length, batch = (256, 2) if small else (512, 16)
        texts = ["".join(pair) for pair in (train_on[:32] if small else train_on)]
        documents = tokenizer(texts, add_special_tokens=False)["input_ids"]
        tokens = [token for document in documents for token in (*document, tokenizer.eos_token_id)]
        self.text = windows(torch.tensor(tokens), None, length)
        self.settings = TrainSettings(
            tokens=batch * length * 3 if small else EPOCHS * self.text.numel(),
            length=length,
            batch=batch,
            micro_batch=batch,
            learning_rate=learning_rate,
            separator=tokenizer.eos_token_id,
            compile=gpu,
        )
        self.count = sum(
            len(tokenizer.encode(prompt + response)) - len(tokenizer.encode(prompt))
            for prompt, response in self.held_out
        )

    def report(self, rows: Rows, variant: str, model: Any, **row: Any) -> None:
        """Two rows of a model, which is left as it is: the loss of responses before and after the fine-tune."""
        tuned = copy.deepcopy(model)
        rows.add(variant=variant, corpus="responses", loss=self.loss(tuned), tuned_tokens=0, tokens=self.count, **row)
        result = train(tuned, self.text, [], self.settings)
        loss = self.loss(tuned)
        rows.add(variant=variant, corpus="responses", loss=loss, tuned_tokens=result.tokens, tokens=self.count, **row)

    def loss(self, model: Any) -> float:
        """Mean over the tokens of all held-out responses, in nats."""
        found = log_likelihoods(model, self.tokenizer, self.held_out, batch=self.batch)
        return -sum(answer.log for answer in found) / self.count
