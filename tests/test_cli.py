"""The command, as a user meets it."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from shearling import cli
from tests.test_run import WORDS, make_recipe
from tests.tiny import tiny_folder


def shearling(capsys: Any, monkeypatch: Any, *arguments: object) -> tuple[int, str, str]:
    """Exit code, output and error output of the command."""
    monkeypatch.setattr(sys, "argv", ["shearling", *map(str, arguments)])
    code: Any = 0
    try:
        cli.main()
    except SystemExit as end:
        code = end.code or 0
    out, err = capsys.readouterr()
    return int(code), out, err


@pytest.fixture
def command(capsys: Any, monkeypatch: Any) -> Any:
    return lambda *arguments: shearling(capsys, monkeypatch, *arguments)


def refused(found: tuple[int, str, str], *parts: str) -> None:
    """Exit code 2, and a last line that names what is wrong."""
    code, out, err = found
    assert code == 2
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert err.rstrip().splitlines()[-1] == errors[0]
    assert "Traceback" not in out + err
    for part in parts:
        assert part in errors[0]


def test_help_and_import_load_nothing_heavy() -> None:
    code = (
        "import sys\nsys.argv = ['shearling', '--help']\nfrom shearling.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'safetensors'} & set(sys.modules)\nassert not heavy, heavy"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    for name in ("run", "plan", "shapes", "cut", "train", "eval", "report", "doctor", "schema"):
        assert name in ended.stdout


@pytest.mark.parametrize(
    "lines",
    [
        "import shearling\nfrom transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM\nimport shearling",
        "import transformers\nimport shearling\nfrom transformers import AutoModelForCausalLM",
        "import shearling, shearling.export\nfrom transformers import AutoModelForCausalLM",
        # whose modules come to the Auto classes while they are being imported
        "import shearling\nfrom transformers import LlamaForCausalLM, AutoModelForCausalLM",
        "import shearling\nfrom transformers.models.gemma2 import modeling_gemma2\n"
        "from transformers import AutoModelForCausalLM",
    ],
)
def test_per_layer_checkpoints_load_after_importing_shearling(tmp_path: Path, lines: str, command: Any) -> None:
    dense, out = tiny_folder(tmp_path / "dense"), tmp_path / "cut"
    text = tmp_path / "text.txt"
    text.write_text(WORDS * 8)
    options = ("--calibration", text, "--sequences", 4, "--length", 32, "--device", "cpu", "--sparsity", 0.3)
    code, _, err = command("cut", dense, "--out", out, *options)
    assert code == 0, err
    assert json.loads((out / "config.json").read_text())["model_type"] == "shearling_llama"
    program = f"{lines}\nprint(type(AutoModelForCausalLM.from_pretrained({str(out)!r})).__name__)"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.stdout.strip() == "ShearlingLlamaForCausalLM", ended.stderr


def test_masks_without_a_recipe(tmp_path: Path, command: Any) -> None:
    dense, out = tiny_folder(tmp_path / "dense"), tmp_path / "masked"
    text = tmp_path / "text.txt"
    text.write_text(WORDS * 8)
    options = ("--calibration", text, "--sequences", 4, "--length", 32, "--device", "cpu", "--method", "wanda")
    code, table, err = command("cut", dense, "--out", out, *options, "--pattern", "2:4")
    assert code == 0, err
    assert "weights under the masks (2:4)" in " ".join(table.split())
    weight = load_file(out / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert ((weight.view(48, 8, 4) != 0).sum(-1) == 2).all()
    again = (dense, "--out", tmp_path / "other", *options)
    refused(command("cut", *again, "--pattern", "4:2"), "sparsify.pattern = '4:2'", "such as 2:4")
    refused(command("cut", *again, "--pattern", "2:5"), "32 inputs are no multiple of 5")
    assert not (tmp_path / "other").exists()


def test_shapes_for_a_budget(tmp_path: Path, command: Any) -> None:
    dense = tiny_folder(tmp_path / "dense")
    code, table, err = command("shapes", dense, "--parameters", 0.7)
    assert code == 0, err
    assert "kv heads" in table and "balanced" in table and "16,576" in table
    code, text, err = command("shapes", dense, "--flops", 0.7, "--json")
    assert code == 0, err
    first = json.loads(text)[0]
    assert first["name"] == "balanced" and 0 < first["share"] <= 0.7
    assert set(first["target"]) == {"layers", "hidden", "heads", "kv_heads", "ffn"}
    refused(command("shapes", dense), "shapes: needs one of parameters, bytes, flops")
    refused(command("shapes", dense, "--bytes", 1, "--flops", 1), "and no other of them")
    refused(command("shapes", dense, "--bytes", 10**9), "must be above 0 and below the")


def test_the_plan_of_a_budget_shows_the_other_shapes(tmp_path: Path, command: Any) -> None:
    file = make_recipe(tmp_path)
    content = yaml.safe_load(file.read_text())
    content["stages"] = [{"stage": "shear", "method": "sheared-llama", "target": {"parameters": 0.7}}]
    file.write_text(yaml.safe_dump(content))
    code, table, err = command("plan", file)
    assert code == 0, err
    assert table.count("16,576") == 2 and "the recipe takes balanced" in table
    code, text, err = command("plan", file, "--json")
    assert code == 0 and json.loads(text)["after"]["parameters"] == 16576
    narrow = "shear.target={parameters: 0.36, profile: depth}"
    refused(command("plan", file, "--set", narrow), "this budget has only balanced, shallower; choose one of them")


def test_a_target_without_a_recipe(tmp_path: Path, command: Any) -> None:
    dense, out = tiny_folder(tmp_path / "dense"), tmp_path / "cut"
    text = tmp_path / "text.txt"
    text.write_text(WORDS * 8)
    options = ("--calibration", text, "--sequences", 4, "--length", 32, "--device", "cpu", "--method", "minitron")
    code, table, err = command("cut", dense, "--out", out, *options, "--target", "layers=2", "--target", "ffn=16")
    assert code == 0, err
    assert "layers" in table
    assert len(load_file(out / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]) == 16
    assert command("cut", dense, "--out", tmp_path / "half", *options, "--target", "parameters=0.7")[0] == 0
    assert json.loads((tmp_path / "half" / "config.json").read_text())["num_hidden_layers"] == 2
    again = ("cut", dense, "--out", tmp_path / "other", *options)
    refused(command(*again, "--target", "fnn=16"), "prune.target.fnn", "did you mean ffn?")
    refused(command(*again, "--target", "ffn"), "prune.target.ffn = ''", "must be a valid integer")
    refused(command(*again, "--target", "ffn=49"), "target.ffn = 49", "the model has 48")
    assert not (tmp_path / "other").exists()


def training_options(tmp_path: Path) -> tuple[object, ...]:
    """Options of ``train`` under which a tiny model takes six steps."""
    text = tmp_path / "text.txt"
    text.write_text(WORDS * 16)
    return (
        *("--text", text, "--tokens", 768, "--length", 32, "--batch", 4, "--micro-batch", 2, "--learning-rate", 0.01),
        *("--evaluation", text, "--context", 32, "--max-tokens", 256, "--device", "cpu"),
    )


def test_training_without_a_recipe(tmp_path: Path, command: Any, monkeypatch: Any) -> None:
    dense, out, options = tiny_folder(tmp_path / "dense"), tmp_path / "out", training_options(tmp_path)
    code, table, err = command("train", dense, "--out", out, *options, "--distill", 0.5, "--teacher", dense)
    assert code == 0, err
    assert "trained" in table and "report.html" in table and "pruned" not in table
    found = json.loads((out / "metrics.json").read_text())
    assert found["recovered"]["perplexity"] < found["dense"]["perplexity"]
    written = yaml.safe_load((out / "recipe.yaml").read_text())
    (stage,) = written["stages"]
    assert (stage["method"], stage["learning_rate"], stage["teacher"]) == ("full", 0.01, str(dense))
    again = ("train", dense, "--out", out, *options)
    refused(command(*again), "already holds a run", "--resume")
    refused(command(*again, "--resume"), "stages.0.distill=0.5, this recipe says 0.0")
    assert command(*again, "--resume", "--distill", 0.5, "--teacher", dense)[0] == 0
    elsewhere = ("train", dense, "--out", tmp_path / "other", *options)
    refused(command(*elsewhere, "--method", "ast"), "train: ", "needs the masks of a sparsify stage")
    refused(command(*elsewhere, "--method", "ful"), "recover.method = 'ful'", "did you mean full?")
    monkeypatch.setitem(sys.modules, "trackio", None)
    refused(command(*elsewhere, "--track", "trackio"), "needs the package trackio; pip install 'shearling[track]'")
    refused(command(*elsewhere, "--teacher", dense), "recover.teacher", "needs distill or layerwise above 0")
    assert not (tmp_path / "other").exists()


def test_interrupted_training_says_how_to_go_on(tmp_path: Path, command: Any, monkeypatch: Any) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("shearling.run.train", interrupted)
    dense = tiny_folder(tmp_path / "dense")
    code, _, err = command("train", dense, "--out", tmp_path / "out", *training_options(tmp_path))
    assert code == 130
    assert "go on with the same command and --resume" in err


def test_plan_of_a_recipe_that_only_trains(tmp_path: Path, command: Any) -> None:
    recipe = make_recipe(tmp_path)
    content = yaml.safe_load(recipe.read_text())
    for model in (content["model"], str(tmp_path / "cut")):
        recipe.write_text(yaml.safe_dump({**content, "model": model, "stages": content["stages"][1:]}))
        code, table, err = command("plan", recipe)
        assert (code, err) == (0, "")
        assert "memory of training, estimated" in table
        planned = json.loads(command("plan", recipe, "--json")[1])
        assert planned["method"] == "lora" and planned["before"] == planned["after"]
        assert planned["estimate"]["peak_bytes"] > planned["after"]["bytes"]
        if model == content["model"]:
            # the second time its model has a width per block
            pruned = ("--calibration", tmp_path / "calibration.txt", "--sequences", 4, "--length", 32)
            assert command("cut", model, "--out", tmp_path / "cut", *pruned, "--device", "cpu")[0] == 0


def test_plan_counts_the_memory_of_adapting(tmp_path: Path, command: Any) -> None:
    recipe = make_recipe(tmp_path)
    content = yaml.safe_load(recipe.read_text())
    prune, recover = content["stages"]
    train = {key: value for key, value in recover.items() if key not in ("method", "mean_rank")}
    found = []
    for stages in ([{**train, "method": "full"}], [{**train, "stage": "adapt"}, prune], [prune, recover]):
        recipe.write_text(yaml.safe_dump({**content, "stages": stages}))
        found.append(json.loads(command("plan", recipe, "--json")[1]))
    full, adapt, lora = (planned.get("estimate", {}).get("peak_bytes") for planned in found)
    assert full == adapt > lora
    assert found[1]["method"] == "cfsp" and found[1]["after"] == found[2]["after"]


def test_a_recipe_recovers_on_packed_text(tmp_path: Path, command: Any) -> None:
    recipe, shards = make_recipe(tmp_path), tmp_path / "shards"
    code, said, err = command("pack", tmp_path / "recovery.txt", "--model", tmp_path / "dense", "--out", shards)
    assert code == 0, err
    assert "tokens in 1 shards" in said
    code, _, err = command("run", recipe, "--out", tmp_path / "packed", "--set", f"recover.text={shards}")
    assert code == 0, err
    found = json.loads((tmp_path / "packed" / "metrics.json").read_text())
    assert found["recovered"]["perplexity"] < found["pruned"]["perplexity"]
    refused(command("pack", tmp_path / "recovery.txt", "--model", tmp_path / "dense", "--out", shards), "is not empty")


def test_run_plan_report(tmp_path: Path, command: Any) -> None:
    recipe, out = make_recipe(tmp_path), tmp_path / "out"
    code, planned, _ = command("plan", recipe, "--json")
    assert code == 0
    code, table, err = command("run", recipe, "--out", out)
    assert code == 0, err
    assert "recovered" in table
    assert "report.html" in table
    made = json.loads((out / "plan.json").read_text())
    assert json.loads(planned)["after"] == made["after"]
    (out / "report.html").unlink()
    assert command("report", out)[0] == 0
    assert (out / "report.html").exists()


def test_plan_prints_the_table_and_nothing_else(tmp_path: Path, command: Any) -> None:
    code, out, err = command("plan", make_recipe(tmp_path))
    assert (code, err) == (0, "")
    assert "parameters" in out
    assert not (tmp_path / "runs").exists()


def test_eval_as_json(tmp_path: Path, command: Any) -> None:
    folder = tiny_folder(tmp_path / "dense")
    (tmp_path / "text.txt").write_text(WORDS * 4)
    options = ("--text", tmp_path / "text.txt", "--context", 16, "--device", "cpu", "--reference", folder, "--json")
    code, out, err = command("eval", folder, *options)
    assert code == 0, err
    found = json.loads(out)
    assert found["perplexity"] > 1
    assert found["kl"] == pytest.approx(0, abs=1e-6)
    assert found["agreement"] == 1


def test_doctor_and_schema(command: Any) -> None:
    code, out, _ = command("doctor", "--json")
    assert code == 0
    assert json.loads(out)["versions"]["torch"] == torch.__version__.partition("+")[0] or torch.__version__ in out
    assert command("doctor")[0] == 0
    code, out, _ = command("schema")
    assert code == 0
    assert "stages" in json.loads(out)["properties"]


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("prune.method=cfps", ["did you mean cfsp?"]),
        ("prune.sparsity=0", ["prune.sparsity"]),
        ("prune.sparsity=1", ["prune.sparsity"]),
        ("prune.sparsity=1.5", ["prune.sparsity"]),
        ("prune.sparsity=.nan", ["prune.sparsity"]),
        ("prune.sparsity=0.9999", ["prune", "0 of 144 channels", "at most"]),
        ("prune.round_to=64", ["round_to=64"]),
        ("prune.sparsty=0.2", ["did you mean sparsity?"]),
        ("calibration.text=nowhere.txt", ["nowhere.txt", "no such file"]),
        ("calibration.length=100000", ["too few"]),
        ("evaluate.context=100000", ["context"]),
        ("model=./nowhere", ["./nowhere"]),
        ("device=cuda:99", ["cuda:99"]),
        ("recover.text=nowhere.txt", ["nowhere.txt"]),
    ],
)
def test_bad_input_leaves_no_model(tmp_path: Path, command: Any, override: str, parts: list[str]) -> None:
    recipe = make_recipe(tmp_path)
    refused(command("run", recipe, "--out", tmp_path / "out", "--set", override), *parts)
    assert not (tmp_path / "out" / "model").exists()
    assert not list(tmp_path.rglob("*.unfinished"))


def test_missing_recipe(command: Any, tmp_path: Path) -> None:
    refused(command("run", tmp_path / "none.yaml"), "none.yaml", "cannot be read")
    assert not (tmp_path / "runs").exists()


def spoil(folder: Path, name: str, value: float) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[3] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_weights_that_are_not_finite_are_named(tmp_path: Path, command: Any) -> None:
    recipe = make_recipe(tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    spoil(tmp_path / "dense", name, float("nan"))
    refused(command("run", recipe, "--out", tmp_path / "out"), name)


def test_activations_that_are_not_finite_are_named(tmp_path: Path, command: Any) -> None:
    recipe = make_recipe(tmp_path)
    # finite, but its square is not
    spoil(tmp_path / "dense", "model.layers.1.mlp.down_proj.weight", 3e38)
    found = command("cut", tmp_path / "dense", "--out", tmp_path / "cut", "--calibration", tmp_path / "calibration.txt",
                    "--sequences", 4, "--length", 32, "--device", "cpu")  # fmt: skip
    refused(found, "model.layers.1", "not finite")
    assert not (tmp_path / "cut").exists()
    assert recipe.exists()


def test_pickled_checkpoints_are_refused(tmp_path: Path, command: Any) -> None:
    recipe = make_recipe(tmp_path)
    folder = tmp_path / "dense"
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    refused(command("run", recipe, "--out", tmp_path / "out"), "pytorch_model.bin", "runs code")


def test_output_that_holds_a_run(tmp_path: Path, command: Any) -> None:
    recipe, out = make_recipe(tmp_path), tmp_path / "out"
    assert command("run", recipe, "--out", out)[0] == 0
    refused(command("run", recipe, "--out", out), "already holds a run", "--resume")
    refused(command("cut", tmp_path / "dense", "--out", out), "already exists")


def test_output_below_a_file(tmp_path: Path, command: Any) -> None:
    (tmp_path / "file").write_text("")
    refused(command("run", make_recipe(tmp_path), "--out", tmp_path / "file" / "out"), "cannot be written")
    refused(command("run", make_recipe(tmp_path), "--out", tmp_path / "file"), "is a file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_output_without_permission(tmp_path: Path, command: Any) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    refused(command("run", make_recipe(tmp_path), "--out", tmp_path / "closed" / "out"), "cannot be written")


@pytest.mark.parametrize(
    "place",
    [
        "shearling.plan.files.Path.write_text",
        "shearling.plan.files.save_file",
        "shearling.export.huggingface._complete_config",
    ],
)
def test_a_full_disk_is_one_line(tmp_path: Path, command: Any, monkeypatch: Any, place: str) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    recipe = make_recipe(tmp_path)
    monkeypatch.setattr(place, full)
    refused(command("run", recipe, "--out", tmp_path / "out"), "cannot be written", "No space left")
    assert not (tmp_path / "out" / "model").exists()
    assert not list(tmp_path.rglob("*.unfinished"))


def test_an_interrupted_command_says_how_to_go_on(tmp_path: Path, command: Any, monkeypatch: Any) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("shearling.commands.plan_stage", interrupted)
    code, _, err = command("run", make_recipe(tmp_path), "--out", tmp_path / "out")
    assert code == 130
    assert "--resume" in err


def test_unknown_architecture_says_what_to_add(tmp_path: Path, command: Any) -> None:
    recipe = make_recipe(tmp_path)
    config = tmp_path / "dense" / "config.json"
    content = json.loads(config.read_text())
    content["model_type"] = "stablelm"
    config.write_text(json.dumps(content))
    refused(command("plan", recipe), "stablelm", "anatomy/families/stablelm.py")


def test_the_written_recipe_is_resolved(tmp_path: Path, command: Any) -> None:
    recipe, out = make_recipe(tmp_path), tmp_path / "out"
    assert command("run", recipe, "--out", out, "--set", "prune.sparsity=0.4")[0] == 0
    written = yaml.safe_load((out / "recipe.yaml").read_text())
    assert written["stages"][0]["sparsity"] == 0.4
    assert written["stages"][0]["temperature"] == 13.1072
