"""A recipe, stage by stage, into a run directory."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from shearling.anatomy import anatomy_of, is_branch
from shearling.card import model_card, provenance, versions
from shearling.commands import calibration_windows, device_of, evaluate_model, load, measured_costs, outcome_of
from shearling.data import read_references
from shearling.errors import ShearlingError
from shearling.events import OnEvent
from shearling.export import check_storable, plan_record, save_model
from shearling.methods.ast import input_norms, masks_of, unmask_
from shearling.methods.corpora import dynamic_loading, separator_of, training_windows, validation_windows
from shearling.methods.quantise import plan_quantised
from shearling.methods.ranking import preview_target, unit_scores
from shearling.methods.recovery import made_trainable, recovery_settings
from shearling.methods.stages import as_saved, budget_of, in_shape, preview_recipe, with_target
from shearling.methods.teaching import check_teacher, teaching
from shearling.models import empty_model, resolve
from shearling.plan import (
    Adapters,
    Delta,
    Edit,
    Grid,
    Outcome,
    Plan,
    Quant,
    Structure,
    inventory_of,
    load_edits,
    plan_of,
    save_edits,
)
from shearling.recipe import (
    AST,
    SOURCE,
    SPP,
    UNSTRUCTURED,
    Adapt,
    Budget,
    Denoise,
    PruneStage,
    Quantise,
    Recipe,
    Shear,
    Sparsify,
    TrainStage,
)
from shearling.report import write_report
from shearling.rundir import RunDir, recorded_shape
from shearling.surgery import attach_adapters_, cut_
from shearling.tracking import Tracker, check_tracker
from shearling.train import TrainResult, World, join, train
from shearling.usage import Usage


class Interrupted(KeyboardInterrupt):
    """A signal ended the run between two steps; what was done is kept."""


def run(recipe: Recipe, out: Path | str, *, resume: bool = False, on_event: OnEvent | None = None) -> dict[str, Any]:
    """Carry out a recipe; returns the content of ``metrics.json``.

    With ``resume`` an unfinished run in ``out`` goes on where it stopped; the result is that of an undisturbed run.
    Raises ShearlingError for unusable input, before anything is written where that can be known, and Interrupted
    where a signal stopped it. Under ``torchrun`` the processes train together; the first one does everything else.
    """
    check_teacher(recipe)
    check_tracker(recipe)
    _check_unmasked(recipe)
    budget, world = budget_of(recipe), join()
    # what is recorded then names the shape, whatever a later version would propose
    if budget is None or budget.latency is None:
        recipe = in_shape(recipe)
    else:
        # processes would measure differently
        recipe = world.agree(_in_measured_shape(recipe, budget, Path(out), on_event) if world.first else None)
    _check_storable(recipe)
    for stage in recipe.trained:
        # only to see whether its file is one
        _references(stage)
    for stage in recipe.trained:
        if stage.batch % world.size:
            raise ShearlingError(f"{stage.stage}.batch = {stage.batch}: must be a multiple of {world.size} processes")
    if world.first:
        with Tracker(recipe, Path(out)) as tracker:
            listeners = [tracker] if on_event is None else [tracker, on_event]
            folder = RunDir(Path(out), recipe, resume=resume)
            if budget is not None and budget.latency is not None:
                folder.record_shape(budget, recipe)
            return _Session(recipe, folder, listeners, world).finish()
    helper: _Session | None = None
    while called := world.agree(None):
        helper = helper or _Session(recipe, RunDir(Path(out), recipe, resume=True), [], world)
        helper.help(called)
    return world.agree(None)


def _in_measured_shape(recipe: Recipe, budget: Budget, out: Path, on_event: OnEvent | None) -> Recipe:
    """The recipe with the shape that its latency comes to; that of a run which has begun, whatever is measured now."""
    known = recorded_shape(out, budget)
    return in_shape(recipe, measured_costs(recipe, on_event)) if known is None else with_target(recipe, known)


def _check_unmasked(recipe: Recipe) -> None:
    """Raise ShearlingError where training without masks would first of all fill the zeros of a model that we masked."""
    unmasked = recipe.adapt is not None or (recipe.first is None and recipe.trained)
    pattern = _own_pattern(recipe.model) if unmasked else None
    if pattern is not None:
        raise ShearlingError(
            f"model {recipe.model!r}: is masked ({pattern}), and training alone would fill its zeros; recover "
            "it in the recipe that masks it, by ast or spp"
        )


def _check_storable(recipe: Recipe) -> None:
    """Raise ShearlingError where the quantised model could not be saved in the end."""
    if recipe.quantise is not None:
        plan = preview_recipe(recipe, empty_model(recipe.model, recipe.dtype))
        # before anything is measured all blocks of a plan are alike
        uniform = plan.anatomy_after.uniform and getattr(recipe.first, "uniform", True)
        check_storable(Grid(recipe.quantise.format, recipe.quantise.group), plan.anatomy_after.family, uniform)


def _own_pattern(model: str) -> str | None:
    """The pattern of the masks that we gave a saved model, if we did."""
    folder = resolve(model)
    if not isinstance(folder, Path) or not (folder / "shearling.json").is_file():
        return None
    return json.loads((folder / "shearling.json").read_text())["plan"].get("masks", {}).get("pattern")


def _references(stage: TrainStage) -> dict[str, float | dict[float, float]] | None:
    """The losses of domains that a stage names or has in a file; None where the dense model gives them, or no one."""
    if stage.loading is None or stage.domains is None or stage.loading.reference == SOURCE:
        return None
    given = stage.loading.reference
    return given if isinstance(given, dict) else read_references(given, stage.domains)


def _record(trained: TrainResult) -> dict[str, Any]:
    """What is kept of a stage that trained."""
    return {name: getattr(trained, name) for name in ("steps", "tokens", "skipped", "best_step", "weights")}


class _Session:
    """One process' work on a run: models are loaded and rebuilt when a stage first asks for them."""

    def __init__(self, recipe: Recipe, folder: RunDir, listeners: Sequence[OnEvent], world: World) -> None:
        self.recipe, self.folder, self.world = recipe, folder, world
        self._listeners = listeners
        self._dense: tuple[Any, Any] | None = None
        self._adapted = False

    def finish(self) -> dict[str, Any]:
        recipe, folder = self.recipe, self.folder
        finished = folder.done("finished")
        if finished is not None:
            self.world.agree(None)
            return self.world.agree(finished)
        folder.log(f"run of {recipe.model}")
        first = recipe.first
        results = {"dense": self._stage("dense", lambda: self._evaluate(self.dense[0]))}
        steps = dict(results)
        if recipe.adapt is not None:
            adapt = recipe.adapt
            steps["adapt"] = self._stage("adapt", lambda: self._train_dense(adapt))
            results["adapted"] = steps["adapted"] = self._stage("adapted", lambda: self._evaluate(self.dense[0]))
        if isinstance(first, Shear):
            steps["shear"] = self._stage("shear", lambda: self._train_dense(first))
        elif first is not None:
            steps["measure"] = self._stage("measure", lambda: self._measure(first))
        outcome = self._restore()
        record = plan_record(outcome.plan, self.dense[0].config)
        folder.write_json("plan.json", record)
        pruned: list[Any] = []

        def cut_model() -> Any:
            if not pruned:
                model = copy.deepcopy(self.dense[0])
                cut_(model, outcome.edits)
                pruned.append(model)
            return pruned[0]

        if first is not None:
            results["pruned"] = steps["pruned"] = self._stage(
                "pruned", lambda: self._evaluate(cut_model(), self.dense[0])
            )
        if not (folder.path / "model").exists():
            model = cut_model()
            if recipe.recover is not None:
                self._call(recipe.recover)
                with Usage() as usage:
                    model, trained = self._train(model, outcome, recipe.recover)
                folder.finish("recover", {**_record(trained), **usage.to_json(), "seconds": trained.seconds})
                results["recovered"] = self._stage("recovered", lambda: self._evaluate(model, self.dense[0]))
            quant = None
            if recipe.quantise is not None:
                quant, *branches = self._quantised(model, recipe.quantise)
                cut_(model, [quant])
                for adapters in branches:
                    # merged they would leave the grid
                    attach_adapters_(model, adapters)
                results["quantised"] = self._stage("quantised", lambda: self._evaluate_codes(model, outcome.plan))
            made = provenance(recipe, record)
            card = model_card(recipe, outcome.plan, results)
            save_model(model, self.dense[1], folder.path / "model", provenance=made, card=card, quant=quant)
        for name in ("recover", "recovered", "quantise", "quantised"):
            found = folder.done(name)
            if found is not None:
                steps[name] = found
        results |= {name: steps[name] for name in ("recovered", "quantised") if name in steps}
        metrics = self._metrics(results, steps)
        folder.write_json("metrics.json", metrics)
        write_report(folder.path)
        folder.finish("finished", metrics)
        folder.tidy()
        folder.log("finished")
        self.world.agree(None)
        return self.world.agree(metrics)

    def help(self, called: str) -> None:
        """Train along with the first process, in the stage that it called for."""
        stage = next(stage for stage in self.recipe.trained if stage.stage == called)
        outcome = self._goal(stage) if isinstance(stage, Adapt | Shear) else self._restore()
        model = copy.deepcopy(self.dense[0])
        cut_(model, outcome.edits)
        self.world.wait()
        self._train(model, outcome, stage)

    def _call(self, stage: TrainStage) -> None:
        """Let the other processes train along; returns when all have opened the folder."""
        self.world.agree(stage.stage)
        self.world.wait()

    @property
    def dense(self) -> tuple[Any, Any]:
        """The model, adapted as soon as that stage is done, and its tokenizer."""
        if self._dense is None:
            self._say({"stage": "load", "model": self.recipe.model})
            self._dense = load(self.recipe.model, self.recipe.device, self.recipe.dtype)
        if self.recipe.adapt is not None and not self._adapted and self.folder.done("adapt") is not None:
            cut_(self._dense[0], load_edits(self.folder.state / "adapted"))
            self._adapted = True
        return self._dense

    def _stage(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Do a piece of work once: what it returned is recorded with its cost."""
        found = self.folder.done(name)
        if found is None:
            self.folder.log(f"{name}: starts")
            with Usage() as usage:
                content = work()
            found = {**content, **usage.to_json()}
            self.folder.finish(name, found)
            self.folder.log(f"{name}: {usage.seconds:.1f} s, {usage.peak_bytes / 2**20:.0f} MiB")
            self._say({"stage": name, "finished": True, **{k: v for k, v in found.items() if k == "perplexity"}})
        return found

    def _evaluate(self, model: Any, reference: Any = None) -> dict[str, Any]:
        return evaluate_model(model, self.dense[1], self.recipe.evaluate, reference=reference, on_event=self._say)

    def _measure(self, stage: PruneStage | Sparsify | Denoise) -> dict[str, Any]:
        model, tokenizer = self.dense
        home = model.device
        if self.recipe.calibration.stream:
            model.to("cpu")
        outcome = outcome_of(self.recipe, stage, model, tokenizer, self.folder.state / "measure", self._event)
        model.to(home)
        save_edits(outcome.edits, self.folder.state / "edits")
        return {"importance": list(outcome.plan.importance)}

    def _quantised(self, model: Any, stage: Quantise) -> tuple[Quant] | tuple[Quant, Adapters]:
        """The model's weights on a grid, measured once, and branches beside them; the model stays as it is."""
        recipe, state = self.recipe, self.folder.state
        pattern = recipe.first.pattern if isinstance(recipe.first, Sparsify) else _own_pattern(recipe.model)

        def work() -> dict[str, Any]:
            edits = plan_quantised(
                model,
                calibration_windows(recipe, self.dense[1]),
                stage,
                # trained weights have left the dense ones behind
                goal=self.dense[0] if isinstance(recipe.first, Sparsify) and recipe.recover is None else None,
                pattern=None if pattern == UNSTRUCTURED else pattern,
                batch=recipe.calibration.batch,
                state_dir=state / "quantise",
                on_event=self._event,
            )
            save_edits(edits, state / "quant")
            return {}

        self._stage("quantise", work)
        found: Any = tuple(load_edits(state / "quant"))
        return found

    def _evaluate_codes(self, model: Any, plan: Plan) -> dict[str, Any]:
        """As ``_evaluate``, with the bytes that the model has as codes."""
        assert plan.quantised is not None
        beside = sum(p.numel() * p.element_size() for name, p in model.named_parameters() if is_branch(name))
        return {**self._evaluate(model, self.dense[0]), "bytes": plan.quantised.bytes + beside}

    def _train_dense(self, stage: Adapt | Shear) -> dict[str, Any]:
        """Train a copy of the dense model; what came of it is kept as edits."""
        self._call(stage)
        model, trained = self._train(copy.deepcopy(self.dense[0]), self._goal(stage), stage)
        structures = [edit for edit in trained.edits if isinstance(edit, Structure)]
        cut_(model, structures)
        values = {name: parameter.detach().cpu() for name, parameter in model.named_parameters()}
        folder = "adapted" if isinstance(stage, Adapt) else "edits"
        save_edits([*structures, Delta(values)], self.folder.state / folder)
        return _record(trained)

    def _restore(self) -> Outcome:
        """Plan and edits from disk, so that a resumed run works on the very same values; no edits without pruning."""
        edits = () if self.recipe.first is None else load_edits(self.folder.state / "edits")
        measured = self.folder.done("measure")
        return self._planned(edits, [] if measured is None else measured["importance"])

    def _goal(self, stage: Adapt | Shear) -> Outcome:
        """The plan of what training the dense model will end in, and no edits yet."""
        if isinstance(stage, Adapt):
            return self._planned()
        return Outcome(preview_target(self.dense[0], stage, self.recipe.model), ())

    def _planned(self, edits: Sequence[Edit] = (), importance: Sequence[float] = ()) -> Outcome:
        recipe, model = self.recipe, self.dense[0]
        anatomy, inventory = anatomy_of(model.config), inventory_of(model)
        method = (recipe.first or recipe.stages[0]).method
        plan = plan_of(recipe.model, method, anatomy, inventory, edits, importance)
        return Outcome(as_saved(recipe, model, plan), tuple(edits))

    def _train(self, model: Any, outcome: Outcome, stage: TrainStage) -> tuple[Any, TrainResult]:
        """Train a model, which an outcome's edits made of the dense one, as a stage says."""
        recipe, dense = self.recipe, self.dense[0]
        text = training_windows(recipe, stage, self.dense[1])
        held_out = validation_windows(stage, self.dense[1])
        settings = recovery_settings(recipe, stage, separator_of(stage, self.dense[1]))
        masks, norms, scores = masks_of(outcome.edits) if isinstance(stage, AST | SPP) else None, None, None
        if isinstance(stage, AST):
            unmask_(model, dense, outcome.edits, masks_alone=stage.slorb is not None)
            if stage.needs_norms:
                norms = input_norms(dense, calibration_windows(recipe, self.dense[1]), recipe.calibration.batch)
        if isinstance(stage, Shear) and stage.gate_start == "ranked":
            tokens = calibration_windows(recipe, self.dense[1])
            scores = unit_scores(dense, tokens, batch=recipe.calibration.batch, on_event=self._say)
        model, policies = made_trainable(recipe, stage, model, outcome.plan, masks, norms, scores)

        def tell(event: dict[str, Any]) -> None:
            if self.world.first:
                self._event({"stage": stage.stage, "steps": settings.steps, **event})

        parameters = outcome.plan.after.parameters
        if stage.loading is not None:
            assert isinstance(held_out, dict), "recipes have validation texts for it"
            table = _references(stage)
            policies.append(dynamic_loading(stage.loading, table, parameters, dense, held_out, settings, tell))
        state = self.folder.state / ("train" if stage.stage == "recover" else stage.stage)
        with teaching(recipe, stage, model, dense, text, settings.separator, outcome.edits, self._say) as followed:
            policies += followed
            result = train(model, text, policies, settings, validation=held_out, state_dir=state, on_event=tell)
        if result.stopped:
            raise Interrupted
        model = model.to(getattr(torch, recipe.dtype))
        if isinstance(stage, AST):
            for edit in result.edits:
                if isinstance(edit, Adapters):
                    # merged they would fill the zeros
                    attach_adapters_(model, edit)
        return model, result

    def _metrics(self, results: dict[str, Any], steps: dict[str, Any]) -> dict[str, Any]:
        private = ("seconds", "peak_bytes", "samples")
        samples = [
            {"prompt": prompt, **{name: row["samples"][n] for name, row in results.items()}}
            for n, prompt in enumerate(self.recipe.evaluate.samples)
        ]
        return {
            "model": self.recipe.model,
            "family": anatomy_of(self.dense[0].config).family.model_type,
            "device": str(device_of(self.recipe.device)),
            "versions": versions(),
            **{name: {k: v for k, v in row.items() if k not in private} for name, row in results.items()},
            "stages": [
                {"name": name, "seconds": step["seconds"], "peak_bytes": step["peak_bytes"]}
                for name, step in steps.items()
            ],
            "samples": samples,
        }

    def _event(self, event: dict[str, Any]) -> None:
        self.folder.event(event)
        self._say(event)

    def _say(self, event: dict[str, Any]) -> None:
        for listener in self._listeners:
            listener(event)
