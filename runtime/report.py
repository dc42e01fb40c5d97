"""--report: the lines of metrics.jsonl, as they are written, for tensorboard and wandb too."""

import importlib
import json
import os
import threading

from runtime.files import naming
from runtime.process import UserError


def check_packages(names):
    """Raises UserError where one of --report is not installed."""
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as e:
            raise UserError(f'--report {name} needs its package ({e}): pip install -e ".[log]"') from None


def open_reports(names, out, first_step):
    """What takes the lines of a run directory that goes on after first_step. Raises UserError. Called by rank 0."""
    reports = []
    if "tensorboard" in names:
        reports.append(TensorBoard(out, first_step))
    if "wandb" in names:
        reports.append(WandB(out))
    return reports


class TensorBoard:
    """Event files in OUT/tensorboard."""

    def __init__(self, out, first_step):
        from torch.utils.tensorboard import SummaryWriter
        # What is after the checkpoint is hidden: metrics.jsonl was cut there. Without one, it begins with step 0.
        self.directory = out / "tensorboard"
        self.writer = SummaryWriter(self.directory, purge_step=first_step + 1 if first_step else 0)
        # The writer has a thread of its own, which a full disk ends with a traceback. `add` reports the error.
        threading.excepthook = be_silent_of_files

    def add(self, step, values):
        with naming(self.directory):
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)
            # Or a kill could cost it steps that the checkpoint has.
            self.writer.flush()

    def close(self):
        with naming(self.directory):
            self.writer.close()


def be_silent_of_files(failure):
    """What a thread failed with is printed, but for an OSError."""
    if not issubclass(failure.exc_type, OSError):
        threading.__excepthook__(failure)


class WandB:
    """A run of wandb, whose own files are in OUT/wandb. One that goes on is one there too, by its id; of steps that
    it has already the first lines stay."""

    def __init__(self, out):
        import wandb
        record = json.loads((out / "config.json").read_bytes())
        (out / "wandb").mkdir(exist_ok=True)
        try:
            # Or it would ask at the terminal for a key, and look at all that we print.
            wandb.setup(wandb.Settings(silent=True, console="off"))
            self.run = wandb.init(project=os.environ.get("WANDB_PROJECT", "balanced-fine-tuning"), name=str(out),
                                  id=record["run_id"], resume="allow", dir=out, config=record)
        except Exception as e:
            # No key, no network, a run that was deleted: the library's words say which.
            raise UserError(f"--report wandb: {e}") from None

    def add(self, step, values):
        self.run.log(values, step=step)

    def close(self):
        self.run.finish()
