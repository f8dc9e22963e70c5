"""`mmfuse fit | validate | test | predict`: LightningCLI with run folders, stages and strict configs."""

from __future__ import annotations

import gc
import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentError
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from transformers.utils.logging import disable_progress_bar

from mmfuse.errors import ConfigError, DataError
from mmfuse.eval.results import write_text_atomically
from mmfuse.training.callbacks import ModelSummary, StepMetrics, progress_callback
from mmfuse.training.checkpoints import (
    AtomicCheckpointIO,
    checkpoint_callbacks,
    load_network_weights,
    read_checkpoint,
    resolve_checkpoint,
)
from mmfuse.training.data import MultimodalData
from mmfuse.training.memory import keep_freed_memory
from mmfuse.training.metrics_csv import MetricsCSV
from mmfuse.training.module import MultimodalModule
from mmfuse.training.reporting import RunReport, export_model, write_run_results
from mmfuse.training.runs import claim_folder, default_folder
from mmfuse.training.stages import Schedule, Stage
from mmfuse.training.strict import explain_mistake, unknown_flag

# What a run's config file leaves out: they belong to one call and not to the run.
_PER_CALL = ("config", "ckpt_path", "verbose", "return_predictions")


class MultimodalCLI(LightningCLI):
    """LightningCLI for `MultimodalModule` and `MultimodalData`.

    Args:
        args: the words of the command line, the subcommand first.
        run: False takes words without a subcommand, builds everything, and runs nothing.
    """

    def __init__(self, args: Sequence[str], *, run: bool = True) -> None:
        strict = {"exit_on_error": False, "allow_abbrev": False}
        super().__init__(
            MultimodalModule,
            MultimodalData,
            save_config_callback=None,
            seed_everything_default=0,
            trainer_defaults={
                # The stages say how long a fit is; it is one epoch of the plan that they make.
                "max_epochs": 1,
                "num_sanity_val_steps": 0,
                "check_val_every_n_epoch": None,
                "use_distributed_sampler": False,
                "enable_model_summary": False,
                "log_every_n_steps": 1,
                "gradient_clip_val": 1.0,
            },
            parser_kwargs={**strict, **dict.fromkeys(self.subcommands(), strict)},
            subclass_mode_data=True,
            args=list(args),
            run=run,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {name: {*skipped, "weights_only"} for name, skipped in LightningCLI.subcommands().items()}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--out", type=str | None, default=None, help="Run folder (default: runs/CONFIG).")
        parser.add_argument("--stages", type=list[Stage], help="What is trained, on what, for how many steps.")
        parser.add_argument("--checkpoint_every", type=int, default=50, help="Steps between `last` checkpoints.")
        parser.link_arguments("stages", "model.stages")
        parser.link_arguments("stages", "data.init_args.stages")
        parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=int)

    def _parse_ckpt_path(self) -> None:
        """Nothing: LightningCLI would take settings out of the checkpoint, and ours are those of the config."""

    # Before anything is built

    def before_instantiate_classes(self) -> None:
        options = self.config[self.subcommand] if self.subcommand else self.config
        self.out = Path(options.out) if options.out else default_folder(options.config)
        options.out = str(self.out)
        if options.checkpoint_every < 1:
            raise ConfigError(f"checkpoint_every must be at least 1 step, got {options.checkpoint_every}")
        # jsonargparse keeps a dataclass as its path and its arguments until it is instantiated.
        stages = [Stage(**stage.init_args.as_dict()) for stage in options.stages or []]
        steps = Schedule(stages).steps
        self.checkpoint: Path | None = None
        if self.subcommand:
            self.checkpoint = resolve_checkpoint(options.ckpt_path or self._usual_checkpoint(), self.out)
        self.settings = self._dumped() if self.subcommand in (None, "fit") else ""
        # Not dumped: the same config with other stages has another length.
        if options.trainer.max_steps == -1:
            options.trainer.max_steps = steps

    def _usual_checkpoint(self) -> str | None:
        """Only `fit` starts without a checkpoint."""
        return None if self.subcommand == "fit" else "best"

    def _dumped(self) -> str:
        options = self.config[self.subcommand] if self.subcommand else self.config
        text = self._parser(self.subcommand).dump(options, skip_none=False)
        settings = {name: value for name, value in yaml.safe_load(text).items() if name not in _PER_CALL}
        return str(yaml.safe_dump(settings, sort_keys=False))

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        options = self.config_init[self.subcommand] if self.subcommand else self.config_init
        self.metrics = MetricsCSV(self.out / "metrics.csv") if self.subcommand == "fit" else None
        loggers: list[Logger] = []
        if self.metrics is not None:
            loggers = [self.metrics, TensorBoardLogger(self.out, name="tensorboard", version="")]
            asked = options.trainer.logger
            loggers += [logger for logger in _as_list(asked) if isinstance(logger, Logger)]
        options.trainer.callbacks = [*_as_list(options.trainer.callbacks), *self._own_callbacks(options)]
        try:
            return super().instantiate_trainer(
                default_root_dir=str(self.out),
                logger=loggers,
                plugins=[*_as_list(options.trainer.plugins), AtomicCheckpointIO()],
                enable_checkpointing=self.subcommand == "fit",
                **kwargs,
            )
        except (ValueError, MisconfigurationException) as error:
            raise ConfigError(f"trainer: {error}") from error

    def _own_callbacks(self, options: Any) -> list[Callback]:
        callbacks: list[Callback] = [StepMetrics(), ModelSummary()]
        if options.trainer.enable_progress_bar is not False:
            callbacks.append(progress_callback())
        # Behind the bar, which ends before the report is printed.
        callbacks.append(RunReport(self.out))
        if self.subcommand == "fit":
            callbacks += checkpoint_callbacks(self.out, options.checkpoint_every)
        return callbacks

    # Commands

    def before_fit(self) -> None:
        # Not before everything is built: a wrong config must leave an earlier run where it is.
        claim_folder(self.out, resuming=self.checkpoint is not None)
        rank_zero_only(write_text_atomically)(self.out / "config.yaml", self.settings)
        self.config_init[self.subcommand].ckpt_path = str(self.checkpoint) if self.checkpoint else None
        if self.checkpoint is not None and self.metrics is not None:
            self.metrics.resume_from(_step_of(self.checkpoint))

    def after_fit(self) -> None:
        """Evaluate the best checkpoint (without validation data the last state) and export it."""
        if not self._finished():
            return
        best = self.out / "checkpoints" / "best.ckpt"
        if best.exists():
            load_network_weights(best, self.model)
        if self.trainer.is_global_zero:
            export_model(self.out, self.model)
        if self.datamodule.held_out["test"] is not None:
            self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)
        elif self.trainer.is_global_zero:
            write_run_results(self.out, self.trainer, self.model)

    def _finished(self) -> bool:
        """Whether all steps were made; an interrupted fit is for resuming and not for evaluation."""
        return bool(self.trainer.global_step >= self.trainer.max_steps and not self.trainer.interrupted)

    def before_validate(self) -> None:
        if self.datamodule.held_out["val"] is None:
            raise ConfigError("data.val is not set: there is nothing to validate on")
        self._use_checkpoint()

    @rank_zero_only
    def after_validate(self) -> None:
        for name in ("val/loss", "val/exact_match"):
            print(f"{name} {float(self.trainer.callback_metrics[name]):.4f}")

    def before_test(self) -> None:
        self._use_checkpoint()

    def before_predict(self) -> None:
        # `RunReport` writes them; Lightning would keep them all.
        self.config_init[self.subcommand].return_predictions = False
        self._use_checkpoint()

    def _use_checkpoint(self) -> None:
        self.config_init[self.subcommand].ckpt_path = None
        assert self.checkpoint is not None
        load_network_weights(self.checkpoint, self.model)


class SettingsOnly(MultimodalCLI):
    """Parses and checks the words, and builds nothing."""

    def instantiate_classes(self) -> None:
        """Nothing."""


def _as_list(value: Any) -> list[Any]:
    """What Lightning takes as nothing, one or several."""
    return [] if value is None else list(value) if isinstance(value, list) else [value]


def _step_of(checkpoint: Path) -> int:
    return int(read_checkpoint(checkpoint, map_location="cpu", mmap=True)["global_step"])


def main(argv: Sequence[str]) -> int:
    """Run one subcommand.

    Args:
        argv: its name and its words.

    Raises:
        ConfigError: a key, class, flag or value that is not known, with what was probably meant.
    """
    parse_and_build(argv)
    _leave_process_group()
    return 0


def _leave_process_group() -> None:
    """End the threads of the process group while Python is whole, if there is one.

    Lightning leaves a gloo group to the end of the process. There a thread that lets go of a tensor meets an
    interpreter which is shutting down, and now and then aborts a rank that has finished its work.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()  # the trainer and the model's wrapper know each other, and hold the group
        torch.distributed.destroy_process_group()


def parse_and_build(argv: Sequence[str], *, run: bool = True) -> MultimodalCLI:
    """Parse the words, build everything, and run the subcommand unless `run` is False.

    Raises:
        ConfigError: see `main`.
    """
    keep_freed_memory()
    return _parsed(MultimodalCLI, argv, run=run)


def resolved_settings(words: Sequence[str]) -> dict[str, Any]:
    """What `fit` with these words (without `fit`) would save as `config.yaml`; nothing is built.

    Raises:
        ConfigError: see `main`.
    """
    settings: dict[str, Any] = yaml.safe_load(_parsed(SettingsOnly, words, run=False).settings)
    return settings


def _parsed(kind: type[MultimodalCLI], argv: Sequence[str], *, run: bool) -> MultimodalCLI:
    _quieten()
    command, words = (argv[0], argv[1:]) if run else ("", argv)
    schema = config_schema(command)
    mistake = unknown_flag(schema, words)
    if mistake:
        raise ConfigError(mistake)
    try:
        return kind(argv, run=run)
    except ArgumentError as error:
        raise ConfigError(explain_mistake(str(error), schema, words)) from error
    except ValueError as error:
        # jsonargparse wraps what a class says about its arguments, and repeats all of them.
        raise user_error(error) or error from None
    except SystemExit as stop:
        # Lightning ends the process itself after Ctrl-C, and with another exit code.
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from stop
        raise


def user_error(error: BaseException | None) -> ConfigError | DataError | None:
    """The user's mistake that `error` was raised for, if there is one."""
    while error is not None and not isinstance(error, ConfigError | DataError):
        error = error.__cause__ or error.__context__
    return error


def config_schema(command: str) -> dict[str, Any]:
    """The keys of a config and their types, for `explain_mistake`."""
    own: dict[str, Any] = {
        "seed_everything": int,
        "trainer": Trainer,
        "model": MultimodalModule,
        "data": MultimodalData,
        "stages": list[Stage],
        "out": str,
        "checkpoint_every": int,
        "ckpt_path": str,
    }
    more = {"validate": {"verbose": bool}, "test": {"verbose": bool}, "predict": {"return_predictions": bool}}
    return own | more.get(command, {})


def _quieten() -> None:
    """Silence what Lightning says to everybody at every start; its warnings about the run itself are kept."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*Consider installing `litmodels`.*")
    # LightningCLI takes our words from Python. `sys.argv` keeps them: its launcher starts the other ranks with them.
    warnings.filterwarnings("ignore", message=".*LightningCLI's args parameter.*")
    # A run that is resumed in place, or was moved, is what it should be.
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
    warnings.filterwarnings("ignore", message="The dirpath has changed from")
    # Lightning's own use of a name that torch renamed.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated.*")
    disable_progress_bar()
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
