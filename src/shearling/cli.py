"""The command ``shearling``. Heavy imports wait until a command needs them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from shearling.errors import ShearlingError

app = typer.Typer(
    help="Prune language models to a budget, retrain them, and write checkpoints that ordinary tools load.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RecipeArgument = Annotated[Path, typer.Argument(help="recipe file (YAML)", metavar="RECIPE")]
Overrides = Annotated[list[str], typer.Option("--set", help="override, as stage.field=value", metavar="FIELD=VALUE")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16")]
Resume = Annotated[bool, typer.Option("--resume", help="go on with an unfinished run")]
ModelArgument = Annotated[str, typer.Argument(help="smollm2-135m, a folder or a hub id")]


@app.command()
def run(
    recipe: RecipeArgument,
    overrides: Overrides = [],  # noqa: B006
    out: Annotated[Path | None, typer.Option(help="run directory; runs/NAME where not given")] = None,
    resume: Resume = False,
) -> None:
    """Carry out a recipe into a run directory."""
    from shearling.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    folder = Path("runs") / recipe.stem if out is None else out
    _carry_out(loaded, folder, resume, f"go on with: shearling run {recipe} --out {folder} --resume")


@app.command()
def plan(
    recipe: RecipeArgument,
    overrides: Overrides = [],  # noqa: B006
    as_json: Annotated[bool, typer.Option("--json", help="print plan.json instead of the table")] = False,
    processes: Annotated[int, typer.Option(min=1, help="how many torchrun would start")] = 1,
) -> None:
    """Show what a recipe would make of its model, and the memory of its training, from the config alone.

    Where a latency is bounded, blocks of the model are timed.
    """
    from shearling.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    _quiet()
    from shearling.export import plan_record
    from shearling.methods.stages import in_shape, preview_recipe, proposed
    from shearling.models import empty_model
    from shearling.run import measured_costs

    with _working("what was measured is kept") as narrator:
        costs = measured_costs(loaded, narrator)
    model = empty_model(loaded.model, loaded.dtype)
    planned = preview_recipe(in_shape(loaded, costs), model, processes)
    record = plan_record(planned, model.config)
    if as_json:
        typer.echo(json.dumps(record, indent=2))
    else:
        from shearling.console import engines_table, plan_table, shapes_table

        _print(plan_table(planned.rows(), f"{loaded.model}, {planned.method}"))
        _print(engines_table(record["engines"]))
        found = proposed(loaded, model, costs)
        if found:
            stage: Any = loaded.first
            _print(shapes_table(found, f"shapes within the budget; the recipe takes {stage.target.profile}"))


@app.command()
def shapes(
    model: ModelArgument,
    parameters: Annotated[float | None, typer.Option(help="below 1 a share, else a number")] = None,
    size: Annotated[float | None, typer.Option("--bytes", help="of the weights, likewise")] = None,
    flops: Annotated[float | None, typer.Option(help="of a token, likewise")] = None,
    latency: Annotated[float | None, typer.Option(help="below 1 a share, else milliseconds, measured here")] = None,
    phase: Annotated[str, typer.Option(help="whose: decode (of one token a row) or prefill")] = "decode",
    batch: Annotated[int, typer.Option(help="rows")] = 1,
    context: Annotated[int, typer.Option(help="tokens of a row, cached or to be read")] = 1024,
    device: Device = "auto",
    dtype: Dtype = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Propose shapes that a model could be cut to within a budget, from its config alone; a latency is measured."""
    from shearling.recipe import Budget, parse_recipe

    bounds = {"parameters": parameters, "bytes": size, "flops": flops, "latency": latency}
    budget = parse_recipe({**bounds, "phase": phase, "batch": batch, "context": context}, "shapes", Budget)
    title, costs = f"{model}, {budget.amount:g} {budget.of.replace('_', ' ')}", None
    if budget.latency is not None:
        with _working("what was measured is kept") as narrator:
            from shearling.run import latency_of

            measured = latency_of(model, budget, device, dtype, narrator)
        costs = measured.costs()
        title += f" of {phase}, batch {batch}, context {context}, {dtype}, on {measured.device}"
    _quiet()
    from shearling.anatomy import anatomy_of
    from shearling.models import empty_model
    from shearling.plan import inventory_of, propose_shapes

    empty = empty_model(model, dtype)
    found = propose_shapes(anatomy_of(empty.config), inventory_of(empty), budget.amount, budget.of, measured=costs)
    if as_json:
        typer.echo(json.dumps([proposal.to_json() for proposal in found], indent=2))
    else:
        from shearling.console import shapes_table

        _print(shapes_table(found, title))


@app.command()
def cut(
    model: ModelArgument,
    out: Annotated[Path, typer.Option(help="new folder for the model")],
    method: Annotated[
        str,
        typer.Option(
            help="cfsp, shearling, wanda-sp, flap, magnitude, random; with a target minitron, shortgpt, random-shape"
        ),
    ] = "cfsp",
    sparsity: Annotated[float, typer.Option(help="share removed, above 0 and below 1")] = 0.2,
    target: Annotated[
        list[str],
        typer.Option(
            help="of a shape (layers, hidden, heads, kv_heads, ffn) or a budget (as of shapes); may be repeated",
            metavar="SIZE=N",
        ),
    ] = [],  # noqa: B006
    pattern: Annotated[
        str | None, typer.Option(help="masks instead: N:M or unstructured, by magnitude, wanda, sparsegpt or alps")
    ] = None,
    of: Annotated[str, typer.Option(help="of what: ffn, parameters or bytes")] = "ffn",
    round_to: Annotated[int, typer.Option(help="widths are multiples of this")] = 1,
    uniform: Annotated[bool, typer.Option("--uniform", help="one width for all blocks")] = False,
    calibration: Annotated[str, typer.Option(help="text to measure on")] = "stdlib:calibration",
    sequences: Annotated[int, typer.Option(help="windows of that text")] = 32,
    length: Annotated[int, typer.Option(help="tokens of a window")] = 1024,
    batch: Annotated[int, typer.Option(help="windows at a time")] = 8,
    stream: Annotated[
        bool, typer.Option("--stream", help="weights stay in host memory, one block on the device")
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "float32",
    seed: int = 0,
) -> None:
    """Prune a model without a recipe and save it."""
    from shearling.recipe import parse_recipe

    stage: dict[str, Any]
    if target:
        sizes = (wish.partition("=") for wish in target)
        stage = {"stage": "prune", "target": {name: number for name, _, number in sizes}}
    elif pattern is None:
        stage = {"stage": "prune", "sparsity": sparsity, "of": of, "round_to": round_to, "uniform": uniform}
    else:
        stage = {"stage": "sparsify", "sparsity": sparsity, "pattern": pattern}
    text = {"text": calibration, "sequences": sequences, "length": length, "batch": batch, "stream": stream}
    content = {
        "model": model,
        "seed": seed,
        "device": device,
        "dtype": dtype,
        "calibration": text,
        "stages": [{**stage, "method": method}],
    }
    recipe = parse_recipe(content, "cut")
    with _working("nothing was written") as narrator:
        from shearling.run import cut as carry_out

        made = carry_out(recipe, out, on_event=narrator)
    from shearling.console import plan_table

    _print(plan_table(made.rows(), f"{model}, {method}"))
    typer.echo(f"model   {out}")


@app.command()
def train(
    model: ModelArgument,
    out: Annotated[Path, typer.Option(help="run directory")],
    method: Annotated[
        str, typer.Option(help="all parameters (full) or low-rank branches that are merged (lora)")
    ] = "full",
    text: Annotated[str, typer.Option(help="text to train on")] = "stdlib:recovery",
    tokens: Annotated[int, typer.Option(help="tokens to train on")] = 1_000_000,
    length: Annotated[int, typer.Option(help="tokens of a window")] = 512,
    batch: Annotated[int, typer.Option(help="windows of a step")] = 8,
    micro_batch: Annotated[int, typer.Option(help="windows at a time")] = 8,
    learning_rate: Annotated[float | None, typer.Option(help="peak; the method's own where not given")] = None,
    cross_entropy: Annotated[float, typer.Option(help="weight of the next token's loss")] = 1.0,
    distill: Annotated[float, typer.Option(help="weight of the divergence from the teacher")] = 0.0,
    teacher: Annotated[str | None, typer.Option(help="model to follow; MODEL as it is where not given")] = None,
    evaluation: Annotated[str, typer.Option(help="text to score before and after")] = "stdlib:evaluation",
    context: Annotated[int, typer.Option(help="tokens of a window of it")] = 1024,
    max_tokens: Annotated[int | None, typer.Option(help="score at most so many")] = None,
    track: Annotated[str | None, typer.Option(help="send the numbers of training to tensorboard or trackio")] = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    seed: int = 0,
    resume: Resume = False,
) -> None:
    """Train a model without a recipe, as it is, into a run directory."""
    from shearling.recipe import parse_recipe

    stage = {
        "stage": "recover",
        "method": method,
        "text": text,
        "tokens": tokens,
        "length": length,
        "batch": batch,
        "micro_batch": micro_batch,
        "cross_entropy": cross_entropy,
        "distill": distill,
        "teacher": teacher,
        **({} if learning_rate is None else {"learning_rate": learning_rate}),
    }
    content = {
        "model": model,
        "seed": seed,
        "device": device,
        "dtype": dtype,
        "evaluate": {"text": evaluation, "context": context, "stride": context, "max_tokens": max_tokens},
        "track": track,
        "stages": [stage],
    }
    recipe = parse_recipe(content, "train")
    _carry_out(recipe, out, resume, "go on with the same command and --resume")


@app.command("eval")
def evaluate(
    model: ModelArgument,
    text: Annotated[str, typer.Option(help="text to score")] = "stdlib:evaluation",
    context: Annotated[int, typer.Option(help="tokens of a window")] = 1024,
    stride: Annotated[int | None, typer.Option(help="tokens between windows; the context where not given")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="score at most so many")] = None,
    batch: Annotated[int, typer.Option(help="windows at a time")] = 1,
    reference: Annotated[str | None, typer.Option(help="model to compare the next-token distribution with")] = None,
    tasks: Annotated[list[str], typer.Option(help="zero-shot task; may be repeated")] = [],  # noqa: B006
    data: Annotated[Path | None, typer.Option(help="folder of raw task files, for offline use")] = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Perplexity of a model; on demand zero-shot tasks and the divergence from another model."""
    from shearling.recipe import Evaluation, parse_recipe

    wish = {
        "text": text,
        "context": context,
        "stride": stride or context,
        "max_tokens": max_tokens,
        "batch": batch,
        "tasks": tasks,
        "data": None if data is None else str(data),
    }
    wanted = parse_recipe(wish, "eval", Evaluation)
    with _working("nothing was written") as narrator:
        from shearling.run import evaluate_model, load

        loaded, tokenizer = load(model, device, dtype)
        other = None if reference is None else load(reference, device, dtype)[0]
        found = evaluate_model(loaded, tokenizer, wanted, reference=other, on_event=narrator)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    for name, value in found.items():
        typer.echo(f"{name}  {value:.4f}" if isinstance(value, float) else f"{name}  {value}")


@app.command()
def export(
    model: ModelArgument,
    to: Annotated[str, typer.Option("--to", help="gguf, deci (widths per layer, for vLLM) or onnx")],
    out: Annotated[Path, typer.Option(help="new file for gguf, else new folder")],
    kind: Annotated[
        str | None, typer.Option("--type", help="of a GGUF file: f16, bf16, q8_0, q4_0, q4_1, q4_k_m and others")
    ] = None,
    verify: Annotated[bool, typer.Option(help="let another program read it back, and compare logits")] = True,
) -> None:
    """Write a model in a format that other engines load."""
    with _working("nothing was written"):
        from shearling.run import export as carry_out

        made = carry_out(model, out, to=to, kind=kind, check=verify)
    from shearling.export import describe

    typer.echo("\n".join([*describe(made), str(out)]))


@app.command()
def bench(
    models: Annotated[list[str], typer.Argument(help="as of eval, or a GGUF file; ratios are to the first")],
    batch: Annotated[list[int], typer.Option(help="rows; may be repeated")] = [1],  # noqa: B006
    context: Annotated[list[int], typer.Option(help="tokens of a prompt; may be repeated")] = [128, 1024],  # noqa: B006
    generate: Annotated[int, typer.Option(help="decode steps after a prompt")] = 32,
    repeats: Annotated[int, typer.Option(help="turns of each model")] = 5,
    device: Device = "auto",
    dtype: Dtype = "float32",
    accelerate: Annotated[bool, typer.Option("--accelerate", help="2:4 linears by the fastest way")] = False,
    out: Annotated[Path | None, typer.Option(help="new folder for bench.json and bench.html")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Speed, latency, memory, size and energy of models side by side, measured in turns."""
    with _working("nothing was written") as narrator:
        from shearling.bench import bench as carry_out

        found = carry_out(
            models,
            batches=batch,
            contexts=context,
            generate=generate,
            repeats=repeats,
            device=device,
            dtype=dtype,
            accelerate=accelerate,
            out=out,
            on_event=narrator,
        ).to_json()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    from shearling.console import bench_tables

    for table in bench_tables(found):
        _print(table)
    if out is not None:
        typer.echo(f"page    {out / 'bench.html'}")


@app.command()
def pack(
    text: Annotated[str, typer.Argument(help="text to tokenise: a file, a folder, a hub data set")],
    model: Annotated[str, typer.Option(help="whose tokenizer")],
    out: Annotated[Path, typer.Option(help="new folder for the shards")],
    max_tokens: Annotated[int | None, typer.Option(help="at most so many")] = None,
) -> None:
    """Tokenise a corpus once into shards, which a recipe's text may name."""
    with _working("the folder is unfinished: remove it"):
        from shearling.data import pack as carry_out
        from shearling.models import load_tokenizer

        packed = carry_out(text, load_tokenizer(model), out, max_tokens=max_tokens)
    typer.echo(f"{packed.tokens} tokens in {len(packed.files)} shards: {out}")


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="run directory", metavar="DIR")]) -> None:
    """Write the HTML page of a run again."""
    from shearling.report import write_report

    typer.echo(str(write_report(folder)))


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False) -> None:
    """Say what this machine can do."""
    from shearling.doctor import diagnose, lines

    found = diagnose()
    typer.echo(json.dumps(found, indent=2) if as_json else "\n".join(lines(found)))


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes."""
    from shearling.recipe import schema as recipe_schema

    typer.echo(json.dumps(recipe_schema(), indent=2))


def main() -> None:
    """Run the command; a user's mistake ends in one line and exit code 2, an interruption in 130."""
    try:
        app()
    except ShearlingError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except BrokenPipeError:
        # the reader of our output has left; nothing of ours is wrong
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _carry_out(recipe: Any, folder: Path, resume: bool, hint: str) -> None:
    """A recipe into a run directory, then its results as a table."""
    with _working(hint) as narrator:
        from shearling.run import run as carry_out

        metrics = carry_out(recipe, folder, resume=resume, on_event=narrator)
    if os.environ.get("RANK", "0") != "0":
        # one of several processes that torchrun started; the first one speaks
        return
    from shearling.console import result_table

    _print(result_table(metrics))
    typer.echo(f"model   {folder / 'model'}\nreport  {folder / 'report.html'}")


@contextmanager
def _working(hint: str) -> Iterator[Any]:
    """Progress while heavy work runs; an interruption says how to go on."""
    from shearling.console import Narrator

    _quiet()
    with Narrator(Console(stderr=True)) as narrator:
        try:
            yield narrator
        except KeyboardInterrupt as interrupt:
            typer.echo(f"interrupted; {hint}", err=True)
            raise typer.Exit(130) from interrupt


def _quiet() -> None:
    """Our own progress is enough."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers.utils import logging

    logging.disable_progress_bar()


def _print(table: Any) -> None:
    Console(width=None if sys.stdout.isatty() else 110).print(table)


if __name__ == "__main__":
    main()
