"""Lines of the original task files into items, worded as lm-eval's tasks of the same name word them.

Each function takes one parsed line. A missing field is a KeyError, a wrong one a ValueError or TypeError; the
reader turns them into one message with file and line.
"""

from __future__ import annotations

import re
from typing import Any

from shearling.evaluate.tasks.items import Item, choices_item

Line = dict[str, Any]


def arc(line: Line) -> Item:
    """ARC easy and challenge."""
    gold = line["choices"]["label"].index(line["answerKey"])
    return choices_item(f"Question: {line['question']}\nAnswer:", line["choices"]["text"], gold)


def piqa(line: Line) -> Item:
    """PIQA; ``label`` comes from the file of labels beside the questions."""
    return choices_item(f"Question: {line['goal']}\nAnswer:", [line["sol1"], line["sol2"]], int(line["label"]))


def hellaswag(line: Line) -> Item:
    """HellaSwag, as published (``ctx_a``, ``ctx_b``, ``activity_label``) or already joined into ``query``."""
    if "query" in line:
        return choices_item(line["query"], line["endings"], int(line["label"]))
    query = f"{line['activity_label']}: {line['ctx_a']} {line['ctx_b'].capitalize()}"
    return choices_item(_unwiki(query), [_unwiki(ending) for ending in line["endings"]], int(line["label"]))


def _unwiki(text: str) -> str:
    # WikiHow's markup, [title], [step] and the like, was left in the published text
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def winogrande(line: Line) -> Item:
    """WinoGrande by partial evaluation: each name fills the gap, and only the words after it are scored."""
    before, gap, after = line["sentence"].partition("_")
    if not gap:
        raise ValueError("sentence has no gap '_'")
    options = [line["option1"], line["option2"]]
    return Item(
        pairs=tuple((before + option, f" {after.strip()}") for option in options),
        gold=("1", "2").index(line["answer"]),
        lengths=tuple(len(option) for option in options),
    )


def boolq(line: Line) -> Item:
    """BoolQ."""
    return choices_item(
        f"{line['passage']}\nQuestion: {line['question']}?\nAnswer:", ["no", "yes"], int(line["answer"])
    )


def openbookqa(line: Line) -> Item:
    """OpenBookQA without its book of facts."""
    gold = line["choices"]["label"].index(line["answerKey"].strip())
    return choices_item(line["question_stem"], line["choices"]["text"], gold)


def lambada(line: Line) -> Item:
    """LAMBADA in OpenAI's form: the last word of the text is to be written."""
    context, gap, word = line["text"].rpartition(" ")
    if not gap or not word:
        raise ValueError("text has no last word")
    return Item(pairs=((context, f" {word}"),), gold=0, lengths=(len(word),))


def copa(line: Line) -> Item:
    """COPA, cause and effect joined by "because" and "therefore"."""
    word = {"cause": "because", "effect": "therefore"}[line["question"]]
    # lm-eval writes two spaces before the choice; scores are comparable only with both
    choices = [" " + line[name][0].lower() + line[name][1:] for name in ("choice1", "choice2")]
    return choices_item(f"{line['premise'].strip()[:-1]} {word}", choices, int(line["label"]))


def sciq(line: Line) -> Item:
    """SciQ with its supporting text; the right answer stands last."""
    choices = [line[name] for name in ("distractor1", "distractor2", "distractor3", "correct_answer")]
    return choices_item(f"{line['support'].lstrip()}\nQuestion: {line['question']}\nAnswer:", choices, 3)
