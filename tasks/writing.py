"""What models write, and embeddings of it."""

import functools
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import hf
from model import CACHE_TOKENS
from runtime.device import autocast
from runtime.process import UserError
from runtime.progress import with_progress
from runtime.sharding import is_sharded
from tasks.items import warn_of_template
from tasks.scoring import MICRO_TOKENS, as_device_likes, micro_batches_of_rank, pack, sum_over_ranks


NEW_TOKENS = 256                     # of an answer to --prompt
ENCODED = 256                        # texts that an encoder gets at a time


# ---------------------------------------------------------------------------------------------------------------------
# Flags that several tasks share: each of them adds all, and argparse lets the last one stand

def add_flags(parser):
    parser.add_argument("--encoder", nargs="+", default=["self"], help="of process and profile: sentence-transformers "
                        "directories or repository ids, or self: the model's own mean last hidden state (default: "
                        "self)")
    parser.add_argument("--template", help="what process or profile asks, with a line's keys in braces, as {gene}")


def check_flags(args):
    if args.template is not None and {"process", "profile"} <= set(args.tasks):
        raise UserError("--template is what one task asks; expected process or profile in --tasks, and not both")
    refuse_twice("--encoder", args.encoder)


def refuse_twice(flag, values):
    if len(set(values)) < len(values):
        raise UserError(f"{flag} names one twice: {' '.join(values)}")


# ---------------------------------------------------------------------------------------------------------------------
# Questions

def fill(template, item):
    """The template with the item's texts in it; a list of texts with commas. Raises UserError."""
    texts = {}
    for key, value in item.items():
        if isinstance(value, (str, int, float)):
            texts[key] = str(value)
        elif isinstance(value, list) and all(isinstance(element, str) for element in value):
            texts[key] = ", ".join(value)
    try:
        return template.format_map(texts)
    except (KeyError, ValueError, IndexError, AttributeError, TypeError) as e:
        raise UserError(f"--template {template!r} cannot be filled from {item['where']} ({e!r}); expected keys of "
                        "the line in braces, such as {gene}") from None


class Prompts(NamedTuple):
    """Questions as models read them."""
    ids: dict                        # {path: [ids, of each question]}
    new_tokens: int                  # how long answers may become


def encode_questions(questions, new_tokens, evaluation):
    """Prompts of questions [(name, turns), ...] in every model's chat format.

    name: what a question is called in an error. turns: of `question_turns`. new_tokens: unless the command line says
    it. Raises UserError where a question and its answer are longer than a model's positions.
    """
    new_tokens = evaluation.args.max_new_tokens or new_tokens
    encoded = {}
    for path, opened in evaluation.models.items():
        warn_of_template(opened, evaluation.ranks)
        encoded[path] = []
        for name, turns in questions:
            try:
                ids, _ = opened.chat_format.encode(turns)
            except UserError as e:
                raise UserError(f"{name}: {e}") from None
            positions = opened.config.max_positions
            if len(ids) + new_tokens > positions:
                raise UserError(f"{path}: {name} has {len(ids)} tokens; expected, with {new_tokens} new ones, at most "
                                f"the {positions} positions of the model")
            encoded[path].append(ids)
    return Prompts(encoded, new_tokens)


def question_turns(text, system=""):
    """A user's turn, after a system text if there is one, and the turn that a model is to write."""
    turns = [hf.Turn("user", text), hf.Turn("assistant", None)]
    if system:
        turns.insert(0, hf.Turn("system", system))
    return turns


def encode_items(file, items, template, new_tokens, evaluation):
    """Prompts of what --template, or else this template, asks about each item of a file. Raises UserError."""
    template = evaluation.args.template or template
    questions = [(f"the prompt of {item['where']}", question_turns(fill(template, item))) for item in items]
    return encode_questions(questions, new_tokens, evaluation)


# ---------------------------------------------------------------------------------------------------------------------
# Answers

class Written(NamedTuple):
    """What a model wrote after a prompt."""
    text: str
    tokens: int
    ended: bool                      # by the model itself; False: it ran out of new tokens
    thinks: bool = False             # whether the prompt has opened thoughts, as DeepSeek-R1-Distill's does

    def answer(self):
        """What follows the thoughts; nothing where they have not ended."""
        _, thought, answer = self.text.rpartition("</think>")
        has_not_ended = "<think>" in answer or (self.thinks and not thought)
        return "" if has_not_ended else answer


def write_answers(prompts, model, opened, evaluation, label=None, samples=1):
    """What one model writes to Prompts, as the command line says: a Written for each sample of each prompt, those of a
    prompt one after the other."""
    args = evaluation.args
    ids = [ids for ids in prompts.ids[opened.path] for _ in range(samples)]
    return write_texts(model, opened.tokenizer, ids, opened.stop, prompts.new_tokens, args.temperature, args.seed,
                       evaluation.dtype, label)


def write_texts(model, tokenizer, prompts, stop, new_tokens, temperature=0.0, seed=0, dtype=torch.float32, label=None):
    """What the model writes after each prompt, a list of ids: a list of Written. label: see `with_progress`. Raises
    UserError."""
    device = next(model.parameters()).device
    # Each id plus 1: zeros are what is not written, or another rank's.
    table = torch.zeros(len(prompts), new_tokens, dtype=torch.int64, device=device)   # (S, new tokens)
    lengths = [len(ids) + new_tokens for ids in prompts]
    # The ranks of a sharded model gather its weights for each new token, together: every rank writes all answers.
    dealt = not is_sharded(model)
    # As many as `generate` has room for: it is slow with few.
    my_micro_batches = [numbers for numbers in micro_batches_of_rank(lengths, CACHE_TOKENS, dealt) if numbers]
    with autocast(device, dtype):
        for micro_batch in with_progress(my_micro_batches, label):
            # Each micro-batch has random numbers of its own, and shares none with another seed.
            own_seed = int(np.random.SeedSequence((seed, micro_batch[0])).generate_state(1)[0])
            try:
                new = model.generate([prompts[i] for i in micro_batch], new_tokens, temperature, stop, own_seed)
            except ValueError as e:
                raise UserError(f"{e}; expected a model that was not ruined") from None
            for i, ids in zip(micro_batch, new):
                table[i, :len(ids)] = ids + 1
    written = []
    for prompt, row in zip(prompts, sum_over_ranks(table) if dealt else table.cpu().numpy()):
        ids = row[row > 0] - 1
        thinks = tokenizer.decode(prompt).rstrip().endswith("<think>")
        # The token that ends an answer is not among them.
        written.append(Written(tokenizer.decode(ids), len(ids), len(ids) < new_tokens, thinks))
    return written


def warn_of_empty(texts, file, opened, evaluation):
    empty = sum(not text.strip() for text in texts)
    if empty:
        evaluation.ranks.print(f"warning: {opened.path}: {empty} of {len(texts)} answers to {file} are empty")


def answer_prompt(prompts, model, opened, evaluation):
    """Prints one model's answer to --prompt."""
    answer, = write_answers(prompts, model, opened, evaluation)
    evaluation.ranks.print(f"--- {opened.path} ({opened.chat_format.name})\n{answer.text}")


# ---------------------------------------------------------------------------------------------------------------------
# Embeddings

@torch.no_grad()
def embed_self(model, tokenizer, texts, dtype=torch.float32, label=None):
    """The mean of the last hidden states over each text's tokens, as many as there are positions, without the
    begin-of-text before them: (S, d) float64; zeros where there is no text. label: see `with_progress`."""
    device = next(model.parameters()).device
    begin = hf.begin_ids(tokenizer)
    rows = [(begin + tokenizer.encode(text))[:model.config.max_positions] for text in texts]
    not_empty = [i for i, row in enumerate(rows) if len(row) > len(begin)]
    table = torch.zeros(len(texts), model.config.n_embd, dtype=torch.float64, device=device)   # (S, d)
    lengths = [len(rows[i]) for i in not_empty]
    my_micro_batches = micro_batches_of_rank(lengths, as_device_likes(MICRO_TOKENS, device))
    for micro_batch in with_progress(my_micro_batches, label):
        numbers = [not_empty[m] for m in micro_batch]
        packed, lengths = pack([rows[i] for i in numbers], device)
        with autocast(device, dtype):
            states = model(packed, lengths)                                                    # (T, d)
        for i, own_states in zip(numbers, states.split(lengths)):
            table[i] = own_states[len(begin):].double().mean(0)
    return sum_over_ranks(table)


def load_encoders(evaluation):
    """{name: texts -> (S, d) numpy} of --encoder. "self" has None for a function: the model itself does it, on every
    rank; the others are needed, and loaded, on rank 0 alone. Raises UserError."""
    encoders = dict.fromkeys(evaluation.args.encoder)
    if evaluation.ranks.rank == 0:
        for name in encoders:
            if name != "self":
                encoders[name] = load_encoder(name, evaluation.ranks.device)
    return encoders


# Two tasks may use the same one.
@functools.cache
def load_encoder(name, device):
    """texts -> (S, d) numpy, zeros where there is no text, by a sentence-transformers directory or repository id.
    Raises UserError."""
    try:
        from sentence_transformers import SentenceTransformer
        from transformers.utils.logging import disable_progress_bar
    except ImportError as e:
        raise UserError(f'--encoder {name} needs sentence-transformers ({e}): pip install -e ".[eval]"') from None
    disable_progress_bar()
    try:
        model = SentenceTransformer(str(name), device=str(device), trust_remote_code=False)
        size = model.encode(["gene"], show_progress_bar=False).shape[1]
    except Exception as e:
        # Many libraries are at work here, each with errors of its own.
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise UserError(f"--encoder {name}: {reason}; expected a sentence-transformers directory or repository id, or "
                        "'self'") from None
    if Path(name).is_dir() and not Path(name, "modules.json").is_file():
        print(f"warning: {name} does not say how to pool: the mean of its last hidden states is used")
    return functools.partial(encode, model, size, f"{name}: embeddings")


def encode(model, size, label, texts):
    vectors = np.zeros((len(texts), size))
    not_empty = [i for i, text in enumerate(texts) if text.strip()]
    parts = [not_empty[first:first + ENCODED] for first in range(0, len(not_empty), ENCODED)]
    for part in with_progress(parts, label):
        vectors[part] = model.encode([texts[i] for i in part], show_progress_bar=False)
    return vectors
