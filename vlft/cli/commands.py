"""The commands: what each is for, its settings, and the function that does its work."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer

from vlft import __version__
from vlft.cli.quiet import quiet
from vlft.console import working

if TYPE_CHECKING:
    from vlft.settings import Settings


@dataclass(frozen=True)
class Command:
    """A command of ``vlft``."""

    # ``module:name`` each, imported when the command is read and when it runs: no command waits for
    # the settings of the others, and --help does not wait for torch.
    settings: str
    work: str
    help: str
    resumes: bool = False  # whether ``work`` also takes the names of the settings that were given

    @property
    def config(self) -> type[Settings]:
        """The class of the settings."""
        found: type[Settings] = _imported(self.settings)
        return found

    def run(self, settings: Settings, given: set[str]) -> None:
        """Does the work with checked settings.

        Args:
            settings: of the command.
            given: names of those that the user gave, by flag or in a file.

        Raises:
            typer.Exit: with code 130, if the user stopped a run before its end.
        """
        quiet()
        with working(f"vlft {__version__}: loading torch and transformers", after=0.2):
            work = _imported(self.work)
        result = work(settings, given) if self.resumes else work(settings)
        if getattr(result, "finished", True) is False:
            raise typer.Exit(130)


def _imported(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


COMMANDS = {
    "sft": Command("vlft.config.training:SftConfig", "vlft.training.run:run_sft",
                   "Fine-tune a model with LoRA, QLoRA or fully.", resumes=True),
    "plan": Command("vlft.config.training:PlanConfig", "vlft.planning.report:run_plan",
                    "Show what vlft sft with the same flags would do and need."),
    "check": Command("vlft.config.data:CheckConfig", "vlft.cli.check:run_check",
                     "Check data files, and show what vlft sft would read."),
    "data": Command("vlft.config.data:DataConfig", "vlft.cli.data:run_data",
                    "Convert COCO, RefCOCO, PAGE, ALTO or OmniDocBench to data."),
    "infer": Command("vlft.config.inference:InferConfig", "vlft.inference.run:run_infer",
                     "Answer a data set, or chat, with a tuned or a base model."),
    "serve": Command("vlft.config.serving:ServeConfig", "vlft.serving.run:run_serve",
                     "Answer requests of OpenAI's API, with adapters of one base."),
    "app": Command("vlft.config.serving:ServeConfig", "vlft.serving.run:run_app",
                   "Serve, with a page to try the models on images in a browser."),
    "eval": Command("vlft.config.evaluation:EvalConfig", "vlft.evaluation.run:run_eval",
                    "Score answers to a data set, or compare two models' answers."),
    "report": Command("vlft.config.models:ReportConfig", "vlft.report.runs:run_report",
                      "Write a run, or several beside each other, as one HTML file."),
    "draw": Command("vlft.config.drawing:DrawConfig", "vlft.inference.draw_run:run_draw",
                    "Draw images of prompts, with a tuned or a base Janus."),
    "merge-lora": Command("vlft.config.models:MergeLoraConfig", "vlft.checkpoints.merge:merge_lora",
                          "Add an adapter to its base and write the merged model."),
    "convert": Command("vlft.config.models:ConvertConfig", "vlft.checkpoints.convert:convert",
                       "Write a model in the authors' layout or in transformers'."),
    "push": Command("vlft.config.sharing:PushConfig", "vlft.sharing.push:run_push",
                    "Upload an adapter or a model with its card to a hub."),
    "models": Command("vlft.config.models:ModelsConfig", "vlft.cli.models:list_models",
                      "List the models that can be tuned."),
    "cache": Command("vlft.config.models:CacheConfig", "vlft.cli.cache:run_cache",
                     "Show or clear what is kept on disk, e.g. image features."),
    "demo": Command("vlft.config.models:DemoConfig", "vlft.cli.demo:run_demo",
                    "Tune, answer and merge on sample data: see it work."),
    "env": Command("vlft.config.models:EnvConfig", "vlft.cli.environment:run_env",
                   "Show versions, machine and GPU, to paste into a report."),
}  # fmt: skip
