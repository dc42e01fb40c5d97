"""The evaluations, one file each, and what they share.

A task is a module with these functions, which eval.py calls in this order and of which it knows nothing else:

    add_flags(parser)                               the flags that only this task has
    check_flags(args)                               raises UserError for values that make no sense
    read(file, number, evaluation)                  reads and checks its file, before any model is loaded -> questions
    ask(questions, model, opened, evaluation)       asks one loaded model, on every rank -> Answers
    finish(questions, answers, evaluation)          once, on rank 0, when every model has been asked -> details: further
                                                    keys of the task's entry in results.json
    rows(questions, answers, details, evaluation)   -> (title, rows) of the table; rows as tasks/statistics.py has them

`questions` is whatever the task likes, `answers` is {path: Answers}. Of several files for one task, `number` counts
from 0. A new task is such a file, and a line in eval.py's TASKS.
"""

import argparse
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import hf


@dataclass
class OpenedModel:
    """A model that the command names, its weights unread. Its chat format is not looked at where none is needed."""
    path: str                        # as the command names it
    directory: Path                  # where its files are
    config: Any                      # GPTConfig
    tokenizer: Any                   # hf.Tokenizer
    template_directory: Path | None  # None: the tokenizer's own
    format_name: str                 # as --chat-format has it

    @functools.cached_property
    def chat_format(self):
        """An hf.ChatFormat. Raises UserError."""
        return hf.load_chat_format(self.template_directory, self.tokenizer, self.format_name)

    @functools.cached_property
    def stop(self):
        """The ids that end an answer. Raises UserError."""
        return hf.stop_ids(self.config, hf.generation_config(self.directory), self.tokenizer, self.chat_format)


class Evaluation(NamedTuple):
    """What the command line says: the same for every task."""
    args: argparse.Namespace
    ranks: Any                       # runtime.ranks.Ranks
    dtype: Any                       # torch.dtype of autocast
    columns: dict                    # {column of the table: [paths], one of each seed}
    models: dict                     # {path: OpenedModel}

    def chat_formats(self):
        """Those of all models, for a title."""
        return " and ".join(sorted({opened.chat_format.name for opened in self.models.values()}))


class Answers(NamedTuple):
    """What one model answered."""
    items: list                      # a dict for each question, as results.json has it
    vectors: dict = {}               # {name: (S, d)}: embeddings that finish() needs, too many numbers for a file


def items_of(answers, columns):
    """{column: [items, of each seed]} of answers {path: Answers}, for `statistics.summarise`."""
    return {column: [answers[path].items for path in paths] for column, paths in columns.items()}
