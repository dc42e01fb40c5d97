"""Files that tasks read: lines with certain keys, and samples that every model reads with its own tokenizer."""

from collections.abc import Callable
from typing import NamedTuple

from data import load_samples
from hf.conversation import add_template_flags, parse_templates
from runtime.process import UserError
from runtime.rows import read_rows


def is_text(value):
    return isinstance(value, str) and value.strip() != ""


def is_texts(value):
    return isinstance(value, list) and value != [] and all(map(is_text, value))


def is_label(value):
    return value in (0, 1)


def is_numbers(value):
    if not isinstance(value, list) or not value:
        return False
    return all(type(number) in (int, float) and abs(number) < 1e30 for number in value)


class Kind(NamedTuple):
    expected: str                    # in words
    fits: Callable                   # value -> whether it is one


KINDS = {
    "text": Kind("some text", is_text),
    "texts": Kind("a list of texts", is_texts),
    "label": Kind("0 or 1", is_label),
    "numbers": Kind("a list of numbers, as many on each line", is_numbers),
}


def load_items(path, **kinds):
    """Rows that have these keys, {key: name of its kind}, further ones allowed: a list of dicts, each with its "line"
    (or row), "where" it is, for errors, and "group". Raises UserError."""
    items = []
    for line, where, row in read_rows(path):
        for key, name in kinds.items():
            kind = KINDS[name]
            fits = kind.fits(row.get(key))
            if fits and name == "numbers" and items:
                fits = len(row[key]) == len(items[0][key])
            if not fits:
                found = str(row.get(key, "missing"))[:50]
                raise UserError(f"{where}: {key!r} is {found}; expected {kind.expected}")
        items.append({**row, "line": line, "where": where, "group": group_of(row)})
    return items


def group_of(row):
    return None if row.get("group") is None else str(row["group"])


def load_genes(path, **kinds):
    """{gene: item} of a file of {"gene", ...}. Raises UserError, also for a gene that is there twice: it would be
    learned from and asked about."""
    genes = {}
    for item in load_items(path, gene="text", **kinds):
        gene = item["gene"]
        if gene in genes:
            raise UserError(f"{item['where']}: {gene} is on line {genes[gene]['line']} too; expected each gene once")
        genes[gene] = item
    return genes


def add_flags_of_samples(parser):
    """The flags of tasks that read samples."""
    add_template_flags(parser)


def check_flags_of_samples(args):
    parse_templates(args.prompt_template, args.response_template)


def load_samples_of_models(file, evaluation, limit=None, lines=()):
    """{path: [Sample, ...]}: the same samples for every model, each by its own tokenizer and chat format.

    limit: the first so many; lines: those on these lines instead. Raises UserError where two models would keep
    different samples.
    """
    args, ranks = evaluation.args, evaluation.ranks
    first = next(iter(evaluation.models))
    templates = parse_templates(args.prompt_template, args.response_template)
    samples = {}
    warnings = []
    cut_at = set()                   # where samples of the file end; None: none of them is cut
    for path, opened in evaluation.models.items():
        warn_of_template(opened, ranks)
        longest = args.max_length or opened.config.max_positions
        found, counts = load_samples(file, opened.tokenizer, opened.chat_format, longest, templates=templates)
        ranks.print(f"{path}: {counts['cut']} of {file} cut at {longest} tokens, {counts['dropped']} dropped")
        warnings += counts["warnings"]
        cut_at.add(longest if counts["cut"] else None)
        samples[path] = choose_samples(found, file, limit, lines)
        same_lines = [sample.line for sample in samples[path]] == [sample.line for sample in samples[first]]
        if not same_lines or len(cut_at) > 1:
            raise UserError(f"{file}: {path} and {first} keep different samples, or parts of them, within their "
                            "positions; expected a --max-length that both have, to compare them on the same ones")
    for warning in dict.fromkeys(warnings):
        ranks.print(f"warning: {warning}")
    return samples


def choose_samples(samples, file, limit, lines):
    if not lines:
        return samples[:limit]
    chosen = [sample for sample in samples if sample.line in lines]
    missing = set(lines) - {sample.line for sample in chosen}
    if missing:
        raise UserError(f"{file}: --lines: there is no sample on line {min(missing)}")
    return chosen


def warn_of_template(opened, ranks):
    """Says once where a model is asked in another chat format than its own."""
    if opened.chat_format.warning:
        ranks.once(f"warning: {opened.chat_format.warning}")
