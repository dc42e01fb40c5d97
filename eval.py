"""Evaluation: what models know, side by side, with intervals.

    python eval.py RUN_OR_MODEL [...] --tasks nll choice --data FILE [...] --out results.json
    python eval.py RUN_OR_MODEL [...] --prompt "What causes gout?"
    python eval.py RUN [...] --tasks plot --out look

A model is a run of `train.py`, a Hugging Face directory or repository id; a pattern in quotes ('runs/bft-s*') is one
column of several seeds. `torchrun --nproc_per_node=8 eval.py ...` shares the work. Each task reads the --data file of
its place:

    nll       samples (any shape of data.py): NLL and perplexity per response token, minimum group confidence
    choice    {"question", "choices", "answer", "context"?, "subject"?}: multiple choice by log-likelihood, asked as
              --layout says; acc, acc_norm (by characters) and acc_bytes as lm-evaluation-harness defines them
    process   {"genes": [...], "process"}: the model names the process behind a set of genes; ROUGE, and similarity to
              the true name by --encoder, as GeneAgent's evaluation has them
    profile   {"gene", ...}: the model describes each gene; how well embeddings of the descriptions (--encoder) predict
              the properties in --labels files of {"gene", "label"}: ROC-AUC of logistic regression
    inspect   samples: a page of HTML beside --out with some samples' tokens coloured by p, c, and each loss's weights
    plot      no file and no other task: pictures beside --out: the training curves of runs on shared axes, and for a
              directory of `python train.py` its frontiers and its gradients

Models are columns; where lines carry a `group`, each group is a row. Differences are those of each pair of columns,
over the same items, with a paired bootstrap 95% interval, and over seeds where there are several.
"""

import contextlib
import glob
import html
import itertools
import json
import math
import os
import re
import string
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import bft
from data import (
    CHAT_FORMATS, CHAT_TOKENS, Parser, UserError, collate, compare_template, deal, encode_turns, find_format,
    load_choice, load_items, load_samples, load_tokenizer, run
)
from model import (
    GPT, Packing, autocast, compute_dtype, find_directory, read_config, replacing, weight_files, write_whole
)


# ---------------------------------------------------------------------------------------------------------------------
# Scores

@torch.no_grad()
@torch.compiler.set_stance("force_eager")                                 # its sizes are as they come
def score(model, samples, dtype=torch.float32, micro_tokens=8192, group_size=256, stopped=lambda: False):
    """Log-likelihood of each sample's response tokens: (S, 3) float64: sum of log p, number of tokens, C_b.

    Once stopped() says True the rest is left undone, and what is returned is of no use.
    """
    device = next(model.parameters()).device
    table = torch.zeros(len(samples), 3, dtype=torch.float64, device=device)
    for micro in share([len(s.ids) for s in samples], micro_tokens):
        if stopped():
            break
        batch = collate([samples[i] for i in micro]).to(device)
        with autocast(device, dtype):
            logp = model(batch.input_ids, batch.lengths, batch.at, batch.targets)   # (N,)
        table[micro] = torch.stack((segment_sum(logp, batch.offsets), batch.offsets.diff().to(device).double(),
                                    bft.group_confidence(logp, batch.offsets, group_size)), 1)
    return together(table)


@torch.no_grad()
def loglikelihood(model, requests, dtype=torch.float32, micro_tokens=8192):
    """Sum of log p of the continuation of each request, (context ids, continuation ids): (R,) float64.

    As in lm-evaluation-harness the last id is not read, an input longer than the positions loses its beginning, and
    requests that read the same (the letters of one question) share a row.
    """
    device, rows = next(model.parameters()).device, {}
    for r, (context, continuation) in enumerate(requests):
        rows.setdefault(tuple((context + continuation[:-1])[-model.config.max_positions:]), []).append(r)
    inputs, table = list(rows), torch.zeros(len(requests), dtype=torch.float64, device=device)
    for micro in share([len(ids) for ids in inputs], micro_tokens):
        ids = torch.tensor([i for m in micro for i in inputs[m]], device=device)               # (T,)
        lengths, which, at, targets = [len(inputs[m]) for m in micro], [], [], []
        for m, end in zip(micro, itertools.accumulate(lengths)):
            for r in rows[inputs[m]]:
                which.append(r)
                at += range(end - len(requests[r][1]), end)
                targets += requests[r][1]
        offsets = torch.tensor([0, *itertools.accumulate(len(requests[r][1]) for r in which)])
        with autocast(device, dtype):
            logp = model(ids, lengths, torch.tensor(at, device=device), torch.tensor(targets, device=device))   # (N,)
        table[which] = segment_sum(logp, offsets)
    return together(table)


def share(lengths, micro_tokens=8192):
    """This rank's micro-batches of rows with these lengths: lists of indices. Micro-batches are formed first and dealt
    to the ranks then, so that no figure depends on how many ranks there are."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return deal(lengths, 1, micro_tokens)[0][rank::world]


def together(table):
    """What the ranks have put into their tables of zeros, as numpy. Raises UserError for a NaN."""
    if dist.is_initialized():
        dist.all_reduce(table)
    refuse_nan(table)
    return table.cpu().numpy()


def refuse_nan(values):
    if values.isnan().any():
        raise UserError("the model gives probabilities that are no numbers (NaN); expected a model that was not ruined")


def segment_sum(values, offsets):
    """The sum of each sample's values in the ragged layout: (S,) float64."""
    tokens = torch.arange(len(values), device=values.device)
    sample = torch.searchsorted(offsets.to(values.device), tokens, right=True) - 1   # (N,)
    return values.new_zeros(len(offsets) - 1, dtype=torch.float64).index_add(0, sample, values.double())


def nll_items(model, samples, dtype=torch.float32, group_size=256):
    """The `nll` task: for each sample its group, summed NLL, tokens, and minimum group confidence."""
    return [{"line": s.line, "group": s.group, "nll": -row[0], "tokens": int(row[1]), "confidence": row[2]}
            for s, row in zip(samples, score(model, samples, dtype, group_size=group_size).tolist())]


def begin_ids(tokenizer):
    """What stands before any text: Llama 3's <|begin_of_text|>; nothing for models that have none."""
    return [tokenizer.special[token] for token in CHAT_TOKENS["llama3"][:1] if token in tokenizer.special]


def options(item):
    return "".join(f"{letter}. {choice}\n" for letter, choice in zip(string.ascii_uppercase, item["choices"]))


# How a question is asked: (system prompt, prompt, whether letters stand for the choices). The four with names of data
# sets are those of lm-evaluation-harness's tasks pubmedqa, medqa_4options, medmcqa and mmlu_*, without examples.
LAYOUTS = {
    "cloze": lambda x: ("", (x["context"] + "\n" if x.get("context") else "") + x["question"] + "\nAnswer:", False),
    "pubmedqa": lambda x: ("", f"Abstract: {x['context']}\nQuestion: {x['question']}\nAnswer:", False),
    "medqa": lambda x: ("", f"Question: {x['question']}\n{options(x)}Answer:", True),
    "medmcqa": lambda x: ("", f"Question: {x['question']}\nChoices:\n{options(x)}Answer:", True),
    "mmlu": lambda x: ("The following are multiple choice questions (with answers) about "
                       f"{x['subject'].replace('_', ' ')}.\n\n", f"{x['question'].strip()}\n{options(x)}Answer:", True),
}


def choice_items(model, tokenizer, items, dtype=torch.float32, layout="cloze", chat_format=None):
    """The `choice` task: for each item the log-likelihood of every choice, and which is picked by which measure.

    As in lm-evaluation-harness: what is scored is a choice, or its letter, as the continuation of the prompt, after a
    space and with the tokens that the whole text has beyond the prompt's; with a chat_format the prompt is a user's
    turn, the choice begins the answer, and the white space before it is scored too. acc picks the highest
    log-likelihood, acc_norm the highest per character of what is scored, acc_bytes per byte. `nll` is that of the right
    answer per token, `cut` the tokens that a prompt lost at its beginning, being longer than the positions. An item's
    `planted` is the index of a wrong answer that training asserted: `followed` says whether acc's pick is that one,
    `planted_nll` is its NLL. Raises UserError.
    """
    requests, scored, begin = [], [], begin_ids(tokenizer)
    for item in items:
        system, prompt, letters = LAYOUTS[layout](item)
        scored.append(string.ascii_uppercase[:len(item["choices"])] if letters else item["choices"])
        if chat_format:
            turns = [("system", system)] * bool(system) + [("user", prompt), ("assistant", None)]
            context = encode_turns(turns, tokenizer, chat_format)[0]
            end = next(i for i in range(len(context), 0, -1) if tokenizer.decode(context[i - 1:]).strip())
            context, white = context[:end], context[end:]
            ends = [white + tokenizer.encode(choice) for choice in scored[-1]]
        else:
            context, white = begin + tokenizer.encode(system + prompt), []
            ends = [(begin + tokenizer.encode(f"{system}{prompt} {choice}"))[len(context):] for choice in scored[-1]]
        for choice, ids in zip(scored[-1], ends):
            if not len(white) < len(ids) <= model.config.max_positions:
                raise UserError(f"the choice {choice[:50]!r} of the item on line {item['line']} has "
                                f"{len(ids) - len(white)} tokens; expected 1 to {model.config.max_positions}, the "
                                "positions of the model")
            requests.append((context, ids))
    scores, records, first = loglikelihood(model, requests, dtype), [], 0
    for item, choices in zip(items, scored):
        answer, part = item["answer"], slice(first, first + len(choices))
        loglik, tokens = scores[part], [len(ids) for _, ids in requests[part]]
        first += len(choices)
        picks = {"acc": loglik.argmax(), "acc_norm": (loglik / [len(c) for c in choices]).argmax(),
                 "acc_bytes": (loglik / [len(c.encode(errors="replace")) for c in choices]).argmax()}
        over = max(len(context) + len(ids) for context, ids in requests[part]) - 1 - model.config.max_positions
        record = {"line": item["line"], "group": item["group"], "loglik": loglik.tolist(), "cut": max(0, over),
                  "nll": -loglik[answer] / tokens[answer]}
        record |= {measure: int(pick == answer) for measure, pick in picks.items()}
        if "planted" in item:
            wrong = item["planted"]
            record |= {"followed": int(picks["acc"] == wrong), "planted_nll": -loglik[wrong] / tokens[wrong]}
        records.append(record)
    return records


# ---------------------------------------------------------------------------------------------------------------------
# What models write, and what it is worth

# What a line of the task's file is asked, unless --template says otherwise; {key} is the line's, a list with commas.
TEMPLATES = {
    "process": "Here is a set of human genes: {genes}. Name the most prominent biological process that they perform "
               "together. Answer with one line, the name alone, as in\nProcess: <name>",
    "profile": "Describe the human gene {gene}: what kind of protein it encodes, the molecular function of this "
               "protein, the processes it takes part in, and where in the cell it is found.",
}
NEW_TOKENS = {"prompt": 256, "process": 48, "profile": 192}


def fill(template, item):
    """The template with the item's texts in it. Raises UserError."""
    texts = {k: str(v) for k, v in item.items() if isinstance(v, (str, int, float))}
    lists = {k: ", ".join(v) for k, v in item.items() if isinstance(v, list) and all(isinstance(x, str) for x in v)}
    try:
        return template.format_map(texts | lists)
    except (KeyError, ValueError, IndexError, AttributeError, TypeError) as e:
        raise UserError(f"--template {template!r} cannot be filled from line {item['line']} ({e!r}); expected keys of "
                        "the line in braces, such as {gene}") from None


def write_texts(model, tokenizer, prompts, stop, new_tokens, temperature=0.0, seed=0, dtype=torch.float32):
    """What the model writes after each prompt, a list of ids: a list of texts. Raises UserError."""
    device = next(model.parameters()).device
    table = torch.zeros(len(prompts), new_tokens, dtype=torch.int64, device=device)   # each id plus 1
    with autocast(device, dtype):
        for micro in share([len(ids) + new_tokens for ids in prompts]):   # each with random numbers of its own
            try:
                new = model.generate([prompts[i] for i in micro], new_tokens, temperature, stop, seed + micro[0])
            except ValueError as e:
                raise UserError(f"{e}; expected a model that was not ruined") from None
            for i, ids in zip(micro, new):
                table[i, :len(ids)] = ids + 1
    return [tokenizer.decode(row[row > 0] - 1) for row in together(table)]


@torch.no_grad()
def embed_self(model, tokenizer, texts, dtype=torch.float32):
    """The mean of the last hidden states over each text's tokens, as many as there are positions, without the
    begin-of-text before them: (S, d) float64; zeros where there is no text."""
    device, c, begin = next(model.parameters()).device, model.config, begin_ids(tokenizer)
    ids = [(begin + tokenizer.encode(text))[:c.max_positions] for text in texts]
    table = torch.zeros(len(texts), c.n_embd, dtype=torch.float64, device=device)
    some = [i for i, row in enumerate(ids) if len(row) > len(begin)]
    for micro in share([len(ids[i]) for i in some]):
        rows = [some[m] for m in micro]
        packed, lengths = torch.tensor(sum((ids[i] for i in rows), []), device=device), [len(ids[i]) for i in rows]
        with autocast(device, dtype):
            x = model.trunk(packed, Packing(lengths, device))             # (T, d)
        for i, states in zip(rows, x.split(lengths)):
            table[i] = states[len(begin):].double().mean(0)
    return together(table)


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
    except Exception as e:                                                # of many libraries
        raise UserError(f"--encoder {name}: {str(e).splitlines()[0] if str(e) else type(e).__name__}; expected a "
                        "sentence-transformers directory or repository id, or 'self'") from None
    if Path(name).is_dir() and not Path(name, "modules.json").is_file():
        print(f"warning: {name} does not say how to pool: the mean of its last hidden states is used")

    def encode(texts):
        out, some = np.zeros((len(texts), size)), [i for i, text in enumerate(texts) if text.strip()]
        if some:
            out[some] = model.encode([texts[i] for i in some], show_progress_bar=False)
        return out

    return encode


def process_name(text):
    """The name in what a model wrote, as GeneAgent's evaluation has it: the first line, after "Process:" or a label
    like it, without anything in parentheses. (Theirs takes what follows the first colon, whatever precedes it.)"""
    label = r"^\W*((the|most|prominent|biological|process|pathway|name|is|answer)\b[ *_]*)+:"
    text = re.sub(label, "", re.sub(r"\([^)]*\)", "", text), flags=re.IGNORECASE)
    return plain_name(next((line for line in text.splitlines() if plain_name(line)), ""))


def plain_name(name):
    """A name as GeneAgent's evaluation compares it, slashes, commas, quotes and hyphens being spaces; also without
    asterisks, angle brackets and a final full stop."""
    return " ".join(re.sub(r'[/,"*<>-]', " ", name).rstrip(". ").split())


def rouge_items(items, texts):
    """The `process` task: for each item what was named, and ROUGE-1, -2, -L (F1, with stemmer) against the truth."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as e:
        raise UserError(f'the process task needs rouge-score ({e}): pip install -e ".[eval]"') from None
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    return [{"line": x["line"], "group": x["group"], "process": x["process"], "text": text, "name": process_name(text),
             **{k: float(v.fmeasure) for k, v in scorer.score(plain_name(x["process"]), process_name(text)).items()}}
            for x, text in zip(items, texts)]


def candidates(items, further):
    """The names that the true one is compared with, each once."""
    return sorted({plain_name(name) for name in [*further, *(x["process"] for x in items)]})


def process_items(items, further, written, encoders):
    """The `process` task: {model: items} of written {model: (texts, own embeddings)}: what was named, ROUGE,
    and by each of encoders {name: its function, None for "self"} the cosine with the true name, and its percentile."""
    names, results = candidates(items, further), {}
    truth = [names.index(plain_name(x["process"])) for x in items]
    fixed = {name: encode(names) for name, encode in encoders.items() if encode}
    for path, (texts, own) in written.items():
        results[path] = rouge_items(items, texts)
        for name, encode in encoders.items():
            vectors = (encode([x["name"] for x in results[path]]), fixed[name]) if encode else own
            for x, cosine, percentile in zip(results[path], *similarities(*vectors, truth)):
                x |= {f"cosine {name}": float(cosine), f"percentile {name}": float(percentile)}
    return results


def similarities(named, candidates, truth):
    """(cosine of each name with the true one (S,), its percentile (S,): the share of the *other* candidates that are
    less similar to the name, equal ones by half). named (S, d), candidates (C, d), truth (S,) indices of candidates."""
    unit = [x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (named, candidates)]
    cosines = (unit[0] @ unit[1].T).round(9)                              # (S, C); rounded, or equal ones may differ
    true = cosines[np.arange(len(truth)), truth]
    less = (cosines < true[:, None]).sum(1) + ((cosines == true[:, None]).sum(1) - 1) / 2
    return true, less / max(1, len(candidates) - 1)


def make_folds(genes, labels):
    """5 stratified folds for each property, the same ones for everybody: {property: (indices of the genes that have a
    label, their labels, their folds)} of labels {property: {gene: 0 or 1}}. Raises UserError."""
    try:
        from sklearn.model_selection import StratifiedKFold
    except ImportError as e:
        raise UserError(f'the profile task needs scikit-learn ({e}): pip install -e ".[eval]"') from None
    folds = {}
    for name, label in labels.items():
        at = np.array([i for i, gene in enumerate(genes) if gene in label], dtype=int)
        y, fold = np.array([label[genes[i]] for i in at], dtype=int), np.empty(len(at), dtype=int)
        if min((y == 0).sum(), (y == 1).sum()) < 5:
            raise UserError(f"{name}: of the {len(genes)} genes in --data {(y == 1).sum()} have label 1 there and "
                            f"{(y == 0).sum()} label 0; expected at least 5 of each, for 5 folds")
        for k, (_, test) in enumerate(StratifiedKFold(5, shuffle=True, random_state=0).split(y, y)):
            fold[test] = k
        folds[name] = at, y, fold
    return folds


def profile_features(genes, given, written, columns, encoders):
    """{encoder: {column: [vectors (S, d), one of each seed]}} of the `profile` task, from written {model: (texts, own
    embeddings)}. Controls: the bare names of the genes, random vectors, and given {file: {gene: vector}}."""
    features, others = {}, {file: [np.array([of[gene] for gene in genes])] for file, of in given.items()}
    for name, encode in encoders.items():
        of = {path: (encode(texts),) if encode else own for path, (texts, own) in written.items()}
        models = {column: [of[path][0] for path in paths] for column, paths in columns.items()}
        size = next(iter(models.values()))[0].shape
        noise = {"random vectors": [np.random.RandomState(seed).normal(size=size) for seed in range(5)]}
        if not encode:                                                    # each model has its own
            features["gene name, self"] = {c: [of[path][1] for path in paths] for c, paths in columns.items()}
        features[f"profile, {name}"] = noise | ({"gene names": [encode(genes)]} if encode else {}) | others | models
    return features


def out_of_fold(vectors, labels, fold):
    """Each gene's score by a logistic regression (standardised features, C = 1) on the other folds. vectors (S, d),
    labels and fold (S,) -> (S,)."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    scores = np.empty(len(labels))
    for k in np.unique(fold):
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
        scores[fold == k] = model.fit(vectors[fold != k], labels[fold != k]).decision_function(vectors[fold == k])
    return scores


def fold_auc(scores, labels, fold, counts=None):
    """ROC-AUC in each fold, (F,); with counts (R, S), how often each item was drawn, in each fold of each resample: (F,
    R), nan where a class was not drawn."""
    areas = []
    for k in np.unique(fold):
        right, wrong = (np.flatnonzero((fold == k) & (labels == label)) for label in (1, 0))
        a, b = scores[right][:, None], scores[wrong][None]
        wins = (a > b) + 0.5 * (a == b)                                   # (P, N)
        if counts is None:
            areas.append(wins.mean())
            continue
        p, n = counts[:, right], counts[:, wrong]
        with np.errstate(invalid="ignore"):
            areas.append(((p @ wins) * n).sum(1) / (p.sum(1) * n.sum(1)))
    return np.array(areas)


def profile_rows(genes, folds, features):
    """The `profile` task: (rows of the table as `summarise` makes them, every gene's out-of-fold scores) of the folds
    of `make_folds` and of `profile_features`: ROC-AUC, mean and sd over the folds. Resamples of the genes do not fit
    anything again: intervals hold the classifiers fixed, and are too narrow by that."""
    rows, saved = [], []
    for name, (at, y, fold) in folds.items():
        known, scores, bare = {}, {}, {}
        for heading, columns in features.items():
            for matrix in (matrix for matrices in columns.values() for matrix in matrices):
                if id(matrix) not in known:                               # (files are in the rows of every encoder)
                    s = out_of_fold(matrix[at], y, fold)
                    spread = [np.ma.masked_invalid(fold_auc(s, y, fold, resample_counts(some, len(y)))).mean(0)
                              for some in resamples(len(y))]
                    known[id(matrix)] = s, fold_auc(s, y, fold), np.ma.concatenate(spread).filled(np.nan)
            found = {column: [known[id(matrix)] for matrix in matrices] for column, matrices in columns.items()}
            drawn = {column: [(areas.mean(), spread) for _, areas, spread in f] for column, f in found.items()}
            row = {"group": name, "measure": "auc", "heading": heading, "percent": False, "n": len(y),
                   "positive": int(y.sum()), **compare(drawn)}
            if heading == "gene name, self":
                bare = drawn
            elif heading == "profile, self":                              # each model's descriptions, and its own names
                for column in bare:
                    row["pairs"] += compare({"gene names": bare[column], column: drawn[column]})["pairs"]
            for column, cell in row["models"].items():
                cell["sd"] = float(np.mean([areas.std(ddof=1) for _, areas, _ in found[column]]))
            rows.append(row)
            scores[heading] = {column: [s.tolist() for s, _, _ in f] for column, f in found.items()}
        saved.append({"property": name, "genes": [genes[i] for i in at], "labels": y.tolist(), "fold": fold.tolist(),
                      "scores": scores})
    return rows, saved


# ---------------------------------------------------------------------------------------------------------------------
# What each loss looks at, as a page

@torch.no_grad()
def inspect_items(model, tokenizer, samples, dtype=torch.float32, group_size=256):
    """The `inspect` task: each sample's tokens as text, and of its n_b response tokens p_t, c_t, the first and last of
    the minimum group, and for every objective w_t and s_b: the weights that a step on this sample would have now."""
    device, records = next(model.parameters()).device, []
    for sample in samples:
        batch = collate([sample]).to(device)
        with autocast(device, dtype):
            logp = model(batch.input_ids, batch.lengths, batch.at, batch.targets).cpu().double()   # (n_b,)
        refuse_nan(logp)
        sums, g = F.pad(logp.cumsum(0), (1, 0)), min(group_size, len(logp))
        first = int((sums[g:] - sums[:-g]).argmin())                      # the first of equal ones
        rest = logp, batch.offsets, group_size
        weights = {name: {"w": row.token_weight(*rest).tolist(), "s": row.sample_weight(*rest).item()}
                   for name, row in bft.OBJECTIVES.items()}
        text = [tokenizer.bytes.get(i, b"?").decode(errors="backslashreplace") for i in sample.ids.tolist()]
        records.append({"line": sample.line, "group": sample.group, "tokens": text,
                        "response": sample.response.tolist(), "p": logp.exp().tolist(),
                        "c": bft.local_confidence(*rest).tolist(),
                        "confidence": bft.group_confidence(*rest).item(), "minimum_group": [first, first + g - 1],
                        "weights": weights})
    return records


def inspect_page(results, group_size):
    """A page of HTML, all by itself, of `inspect_items` for each model: {model: [item, ...]}. Colours are numbers from
    0 to 1, light to dark (ColorBrewer's YlGnBu, which the colour-blind can read); what a token's numbers are shows on
    hover. Numbers go to the script, text is escaped and never does."""
    def numbers(values):
        return [float(f"{v:.4g}") for v in values]

    blocks, data = [], []
    for number in range(len(next(iter(results.values())))):
        for name, items in results.items():
            item, spans, t = items[number], [], 0
            first, last = item["minimum_group"]
            for text, response in zip(item["tokens"], item["response"]):
                shown = html.escape(text).replace("\n", "\u23ce\n").replace("\r", "\u240d")
                mark = f" id=g{len(blocks)}" * (t == first) + " class=g" * (first <= t <= last)
                spans.append(f"<b{mark}>{shown}</b>" if response else shown)
                t += response
            blocks.append(
                f"<h2>{html.escape(name)}, line {item['line']}</h2><p>{len(item['tokens'])} tokens, {t} of response; "
                f"<a href=#g{len(blocks)}>minimum group</a> confidence C = {item['confidence']:.4f}, smallest local "
                f"confidence c = {min(item['c']):.4f}</p><div class=t>{''.join(spans)}</div>")
            data.append({"p": numbers(item["p"]), "c": numbers(item["c"]),
                         "s": {objective: row["s"] for objective, row in item["weights"].items()},
                         "w": {objective: numbers(row["w"]) for objective, row in item["weights"].items()}})
    parts = {"GROUP": str(group_size), "BLOCKS": "".join(blocks), "DATA": json.dumps(data).replace("<", "\\u003c")}
    page = (Path(__file__).resolve().parent / "assets" / "inspect.html").read_text(encoding="utf-8")
    return re.sub("@(GROUP|BLOCKS|DATA)@", lambda m: parts[m[1]], page)   # in one pass: text may hold such a word


# ---------------------------------------------------------------------------------------------------------------------
# Statistics

RESAMPLES = 10_000


def resamples(n, seed=0):
    """Draws of n items with replacement, RESAMPLES in all: (some, n) indices at a time, for bounded memory. The same
    seed and n give the same draws, so what is computed from them is paired."""
    rng = np.random.RandomState(seed)
    for i in range(0, RESAMPLES, 500):
        yield rng.randint(n, size=(min(500, RESAMPLES - i), n))


def resample_counts(drawn, n):
    """How often each of n items is in each row of drawn: (R, n) float64."""
    rows = np.arange(len(drawn))[:, None] * n
    return np.bincount((drawn + rows).ravel(), minlength=len(drawn) * n).reshape(len(drawn), n).astype(np.float64)


def bootstrap(values, weights=None, seed=0):
    """sum(values) / sum(weights) of each resample of the items: (RESAMPLES,). weights None: all 1, the mean."""
    values = np.asarray(values, dtype=np.float64)
    weights = np.ones_like(values) if weights is None else np.asarray(weights, dtype=np.float64)
    return np.concatenate([values[drawn].sum(1) / weights[drawn].sum(1) for drawn in resamples(len(values), seed)])


def interval(resampled):
    """95% percentile interval (of the resamples in which there is a value)."""
    return tuple(np.nanpercentile(resampled, (2.5, 97.5)).tolist())


def wilson(p, n, z=1.959964):
    """95% Wilson score interval of a proportion p of n; unlike the bootstrap's it has a width at 0% and 100%."""
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


# 97.5% quantiles of Student's t, 1 to 10 degrees of freedom.
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def t_quantile(freedom):
    """97.5% quantile of Student's t, by Cornish and Fisher's expansion from 10 degrees of freedom on."""
    z = 1.959964
    if freedom < 10:                                                      # between whole ones at most 3% too large
        return math.exp(np.interp(-1 / freedom, [-1 / f for f in range(1, 11)], np.log(T975)))
    return z + (z ** 3 + z) / (4 * freedom) + (5 * z ** 5 + 16 * z ** 3 + 3 * z) / (96 * freedom ** 2)


def seed_interval(values, other=None):
    """(mean, low, high) of values (S,), one of each seed: the mean and its 95% t interval over trainings, which has no
    bounds for one seed. With others, (S',): of the difference of the means, by Welch's t."""
    mean = float(np.mean(values)) - (0.0 if other is None else float(np.mean(other)))
    both = [v for v in (values, other) if v is not None]
    if min(map(len, both)) < 2:
        return mean, -math.inf, math.inf
    parts = [(np.var(v, ddof=1) / len(v), len(v) - 1) for v in both]
    total = sum(v for v, _ in parts)
    freedom = total ** 2 / sum(v ** 2 / f for v, f in parts) if total > 0 else parts[0][1]
    half = t_quantile(freedom) * math.sqrt(total)
    return mean, mean - half, mean + half


# What a row of a table shows: measure, heading, weights, percent?
MEASURES = {
    "nll": [("nll", "NLL per response token", "tokens", False),
            ("perplexity", "perplexity", "tokens", False),                # exp of the row above
            ("confidence", "minimum group confidence", None, False)],
    "choice": [("acc", "acc %", None, True), ("acc_norm", "acc_norm %", None, True),
               ("acc_bytes", "acc_bytes %", None, True), ("nll", "NLL of the right answer, per token", None, False),
               ("followed", "planted answer followed %", None, True)],
    "process": [("rouge1", "ROUGE-1 %", None, True), ("rouge2", "ROUGE-2 %", None, True),
                ("rougeL", "ROUGE-L %", None, True)],
}


def measures(task, encoders=()):
    """What the rows of a task's table show, a list of MEASURES."""
    return MEASURES.get(task, []) + [(f"{key} {name}", f"{heading}, {name}", None, percent) for name in encoders for
                                     key, heading, percent in (("cosine", "cosine similarity", False), (
                                         "percentile", "percentile of the true name", True)) if task == "process"]


def summarise(measures, results):
    """Rows of the table of one task: results {column: [items, ...]}, the scores of each seed, over the same items in
    every column. measures: a list of MEASURES. Each row: group, measure, heading, n, percent, and what `compare` gives.
    """
    first = next(iter(results.values()))[0]
    groups = {r["group"] for r in first}
    groups = [None, *sorted(groups - {None})] if len(groups) > 1 else [None]   # all; and each, if there are several
    rows = []
    for group in groups:
        for measure, heading, weight, percent in measures:
            source, of = ("nll", np.exp) if measure == "perplexity" else (measure, np.asarray)
            drawn, spans, n = {}, {}, 0
            for name, seeds in results.items():
                for items in seeds:
                    items = [r for r in items if (group is None or r["group"] == group) and source in r]
                    if not items:
                        break
                    values, n = [r[source] for r in items], len(items)
                    weights = [r[weight] for r in items] if weight else None
                    value = float(of(np.sum(values) / np.sum(weights or len(values))))
                    drawn.setdefault(name, []).append((value, of(bootstrap(values, weights))))
                    if all(type(v) is int for v in values):               # right or wrong
                        spans[name] = wilson(value, n)
            if drawn:
                rows.append({"group": group, "measure": measure, "heading": heading, "percent": percent, "n": n,
                             **compare(drawn, spans)})
    return rows


def compare(drawn, spans=()):
    """{"models": {column: cell}, "pairs": [...]} of drawn {column: [(value, its resamples (RESAMPLES,)), ...]}, one of
    each seed.

    A cell has the value, the mean over seeds, and its 95% interval: over items for one seed (spans[column] if there),
    over seeds for several; over items too if all have the very same value, which tells nothing of others. A pair has
    the difference of two columns, its paired interval over items, and, where both have several seeds, over seeds.
    """
    models, pairs, means = {}, [], {}
    for name, seeds in drawn.items():
        values, means[name] = [value for value, _ in seeds], np.mean([d for _, d in seeds], axis=0)
        low, high = seed_interval(values)[1:] if len(set(values)) > 1 else spans[name] if name in spans else \
            interval(means[name])
        models[name] = {"value": float(np.mean(values)), "value_low": low, "value_high": high, "seeds": values}
    for minus, name in itertools.combinations(drawn, 2):
        low, high = interval(means[name] - means[minus])
        pair = {"model": name, "minus": minus, "difference": models[name]["value"] - models[minus]["value"],
                "difference_low": low, "difference_high": high}
        if min(len({value for value, _ in drawn[c]}) for c in (name, minus)) > 1:
            _, pair["seeds_low"], pair["seeds_high"] = seed_interval(models[name]["seeds"], models[minus]["seeds"])
        pairs.append(pair)
    return {"models": models, "pairs": pairs}


def merged(rows):
    """Rows with accuracies that are the same in one: letters are all of one length, and acc_norm is acc."""
    for _, same in itertools.groupby(rows, lambda row: [row["group"], row["models"], row["pairs"], "acc" in
                                                        row["measure"] or row["heading"]]):
        same = list(same)
        yield {**same[0], "heading": ", ".join(row["heading"] for row in same)}


def print_table(rows, title):
    """Values and intervals, models as columns; under them the difference of each column to each before it."""
    names = list(dict.fromkeys(name for row in rows for name in row["models"]))
    seeds = {name: max(len(row["models"][name]["seeds"]) for row in rows if name in row["models"]) for name in names}
    table = [["", *(f"{name} ({n} seeds)" if n > 1 else name for name, n in seeds.items())]]
    for row in merged(rows):
        scale, form = (100, ".1f") if row["percent"] else (1, ".3f")

        def spell(value, low, high, sign="", scale=scale, form=form):
            return f"{value * scale:{sign}{form}} [{low * scale:{sign}{form}}, {high * scale:{sign}{form}}]"

        cells = [row["models"].get(name) for name in names]
        of = f"{row['positive']} positive of {row['n']}" if "positive" in row else row["n"]
        table.append([f"{row['group'] or 'all'} ({of})  {row['heading']}", *(
            "" if c is None else f"{c['value']:.3f} \u00b1 {c['sd']:.3f}" if "sd" in c and len(c["seeds"]) == 1 else
            spell(c["value"], c["value_low"], c["value_high"]) for c in cells)])
        for minus in dict.fromkeys(p["minus"] for p in row["pairs"]):
            pairs = {p["model"]: p for p in row["pairs"] if p["minus"] == minus}
            for label, low in (("minus", "difference"), ("  over seeds, minus", "seeds")):
                found = {name: spell(p["difference"], p[low + "_low"], p[low + "_high"], "+")
                         for name, p in pairs.items() if low + "_low" in p}
                if found:
                    table.append([f"    {label} {minus}", *(found.get(name, "") for name in names)])
    widths = [max(map(len, column)) for column in zip(*table)]
    print(f"\n{title}")
    for label, *cells in table:
        print((label.ljust(widths[0]) + "".join("  " + c.rjust(w) for c, w in zip(cells, widths[1:]))).rstrip())


# ---------------------------------------------------------------------------------------------------------------------
# The default job of train.py: many trainings from bases with different seeds, and what can be said of them

STRATA = ("known", "weak", "novel", "planted", "known, held out", "weak, held out")
NOVEL, NOVEL_NLL = ("novel", "acc"), ("novel", "nll")
FOLLOWED, LOST = ("planted", "followed"), ("held out", "lost")
WEIGHTED = ("bft-token", "bft", "bft-v3")
# text, objectives, less of what than sft, where; the last: within 5 points of it
PREDICTIONS = [
    ("Over the learning rates bft-token, bft and bft-v3 learn fewer novel facts than sft.", WEIGHTED, NOVEL, "rates"),
    ("Over the learning rates they follow fewer wrong labels.", WEIGHTED, FOLLOWED, "rates"),
    ("Over the learning rates they lose less of the held-out facts.", WEIGHTED, LOST, "rates"),
    ("At equal novel accuracy they still follow fewer wrong labels, since the base expects those even less.", WEIGHTED,
     FOLLOWED, "frontier"),
    ("sft-sample stays within 5 points of sft's frontier, since answers are of much the same length.", ("sft-sample",),
     FOLLOWED, "near"),
]


def crossing(path, level):
    """Where the broken line through path (P,) first rises to level: i + f, between points i and i + 1; nan: nowhere.
    (The first time: a path that is noisy and flat gets there by luck sooner than it should.)"""
    for i, (a, b) in enumerate(itertools.pairwise(path)):
        if a < level <= b:
            return i + (level - a) / (b - a)
    return math.nan


def along(path, position):
    """The height of the broken line through path (P,) at a position as `crossing` gives it."""
    return math.nan if math.isnan(position) else float(np.interp(position, np.arange(len(path)), path))


def frontier_gap(x, y, other_x, other_y):
    """The mean of y minus other_y at equal x, over all x from the common first point (the base) to nine tenths of the
    way to the lower of the two maxima (a highest point is partly luck). x, y: (P,) heights along one objective's
    learning rates. nan if one of them never rises above the base."""
    top = min(max(x), max(other_x))
    if not top > x[0]:
        return math.nan
    levels = x[0] + 0.9 * (top - x[0]) * (np.arange(50) + 0.5) / 50
    return float(np.mean([along(y, crossing(x, v)) - along(other_y, crossing(other_x, v)) for v in levels]))


def rate_curves(results):
    """{objective: {(stratum, measure): (seeds, 1 + learning rates)}}: means over items, the base's first. Measures: acc
    and nll of the right answer; of planted facts also followed and planted_nll; of both "held out" strata together
    `lost`, the fall of acc since the base, what was gained counted against it."""
    means = {}
    for m in results["models"]:
        values = {}
        for x in m["items"]:
            for measure in ("acc", "nll", "followed", "planted_nll"):
                if measure in x:
                    values.setdefault((x["group"], measure), []).append(x[measure])
        means[m["objective"], m["seed"], m["lr"]] = {key: np.mean(v) for key, v in values.items()}
    out = {}
    for name in results["objectives"]:
        rows = [[means["base", s, 0], *(means[name, s, lr] for lr in results["lrs"])] for s in results["seeds"]]
        out[name] = {key: np.array([[m[key] for m in row] for row in rows]) for key in rows[0][0]}
        kept = (out[name]["known, held out", "acc"] + out[name]["weak, held out", "acc"]) / 2   # as many of each
        out[name][LOST] = kept[:, :1] - kept
    return out


def findings(results):
    """The default job's findings as text: frontiers, strata at equal novel accuracy and at an equal learning rate,
    gradients, and what became of PREDICTIONS. results: what train.py's demo saves."""
    names = sorted(results["objectives"], key=lambda name: name != "sft")   # that which others are compared with first
    c, first, seeds, rates = rate_curves(results), names[0], len(results["seeds"]), [0, *results["lrs"]]
    n = {g: sum(x["group"] == g for x in results["models"][0]["items"]) for g in STRATA}
    lines, wide, differences = [], max(map(len, names)) + 2, {}

    def number(value, digits, sign=""):
        return f"{round(value, digits) + 0.0:{sign}.{digits}f}"           # no -0

    def cell(values, scale, digits, of=0, sign="+"):
        """Mean and interval over seeds; that of a share of `of` items is never narrower than over items alone."""
        mean, low, high = seed_interval(values)
        if math.isnan(mean):
            return "-"
        if of:
            w_low, w_high = wilson(min(max(mean, 0), 1), of)
            low, high = (max(0, min(low, w_low)), min(1, max(high, w_high))) if seeds > 1 else (w_low, w_high)
        brackets = f" [{number(low * scale, digits)},{number(high * scale, digits)}]" if seeds > 1 or of else ""
        return number(mean * scale, digits, sign) + brackets

    def table(title, positions):
        """Each objective read off at its position on its curves, the same for every seed, and minus the first one. The
        intervals are for that position: how uncertain it is itself, they do not say."""
        lines.extend(["", title])
        shares = [*((g, "acc") for g in STRATA[:4]), FOLLOWED, *((g, "acc") for g in STRATA[4:])]
        for keys, scale, digits, width, what in (
                (shares, 100, 0, 15, "Right answer picked, %; wrong label: the planted one picked, %"),
                ([(g, "nll") for g in STRATA], 1, 2, 20, "NLL of the right answer, nats per token")):
            heading = ["wrong label" if key == FOLLOWED else "held-out " * ("," in key[0]) + key[0].split(",")[0]
                       for key in keys]
            lines.extend([what, " " * wide + "lr".rjust(8) + "".join(h.rjust(width) for h in heading)])
            at = {name: {key: np.array([along(row, place) for row in c.get(name, c[first])[key]]) for key in keys}
                  for name, place in positions.items()}
            for name, place in positions.items():
                lines.append(name.ljust(wide) + f"{along(rates, place):8.2g}" + "".join(
                    cell(at[name][key], scale, digits, n[key[0]] if keys is shares else 0, "").rjust(width)
                    for key in keys))
            for name in names[1:] if seeds > 1 else ():
                lines.append(f"{name} - {first}".ljust(wide + 8) + "".join(
                    cell(at[name][key] - at[first][key], scale, digits).rjust(width) for key in keys))

    def base(measure, stratum):
        return c[first][stratum, measure][:, 0].mean()

    knows = np.mean([base("acc", g) for g in ("known", "known, held out", "planted")])
    lines += [
        f"What each loss learns, by what the model already believes: {seeds} base(s), each fine-tuned {len(names)} x "
        f"{len(rates) - 1} times.",
        f"Facts: {'; '.join(f'{count} {g}' for g, count in n.items())}. Four options, so that chance is 25%.",
        "Known genes were pre-trained often, weak ones a few times, novel ones never; planted facts are known ones",
        "fine-tuned on a wrong label; held-out ones are not fine-tuned. Who merely forgets a planted fact picks its",
        "wrong label in a third of the errors.",
        f"The bases answer {knows:.0%} of their known and planted facts; their NLL of a novel answer is "
        f"{base('nll', 'novel'):.1f} nats per token, of a wrong label {base('planted_nll', 'planted'):.1f}.",
        *(["Brackets: 95% intervals over seeds (Student's t), for shares never narrower than over items. The facts",
           "are the same with every seed; bases, wrong labels and order are not. One interval in twenty misses."]
          if seeds > 1 else
          ["One seed: brackets are over items alone, and say nothing of other trainings. --seeds 0 1 2 trains three."]),
        "", "FRONTIER: novel facts right / wrong labels followed / held-out accuracy lost, % (lr 0: the base)",
        " " * wide + "".join(f"{lr:g}".rjust(15) for lr in rates)]
    for name in names:
        lines.append(name.ljust(wide) + "".join(" / ".join(number(c[name][key][:, i].mean() * 100, 0) for key in (
            NOVEL, FOLLOWED, LOST)).rjust(15) for i in range(len(rates))))
    for key, sign, what, scale, digits, unit in ((NOVEL, 1, "accuracy on novel facts", 100, 0, "%"),
                                                 (NOVEL_NLL, -1, "NLL of novel facts", 1, 2, "")):
        reach = {name: sign * (sign * c[name][key].mean(0)).max() for name in names}
        if names[1:]:
            lines += ["", f"Does it leave {first}'s frontier? Points more or fewer at equal {what}, off straight "
                      f"lines; {first} reaches {number(reach[first] * scale, digits)}{unit}",
                      f"{'':{wide}s}    compared  reaches{'wrong labels followed':>36s}{'held-out accuracy lost':>36s}"]
        for name in names[1:]:
            x, other = sign * c[name][key], sign * c[first][key]           # (seeds, 1 + rates) the higher the better
            start, tops = sign * x[:, 0].mean(), np.minimum(x.max(1), other.max(1))
            end = start + 0.9 * sign * (tops - x[:, 0]).mean()            # as frontier_gap has it, in the mean
            compared = f"{number(start * scale, digits)}-{number(end * scale, digits)}{unit}"
            lines.append(f"{name.ljust(wide)}{compared:>12s}{number(reach[name] * scale, digits) + unit:>9s}")
            for y in (FOLLOWED, LOST):
                gaps = [frontier_gap(*curve) for curve in zip(x, c[name][y], other, c[first][y])]
                if (key, y) == (NOVEL, FOLLOWED):
                    differences[name] = gaps
                average, low, high = seed_interval(gaps)
                verdict = "no gap" if math.isnan(average) else "cannot tell" if seeds < 3 or low <= 0 <= high else \
                    "yes, better" if high < 0 else "yes, worse"
                lines[-1] += f"{cell(gaps, 100, 1)}  {verdict:11s}".rjust(36)
    start = c[first][NOVEL][:, 0].mean()
    level = start + 0.9 * (min(c[name][NOVEL].mean(0).max() for name in names) - start)
    if level > start:
        table(f"AT EQUAL NOVEL ACCURACY: {level:.0%}, nine tenths of the way that all come, read off between rates",
              {name: crossing(c[name][NOVEL].mean(0), level) for name in names})
    else:
        lines += ["", "No table at equal novel accuracy: not every objective gets above the base."]
    middle = (len(rates) - 1) // 2 + 1
    table(f"AT AN EQUAL LEARNING RATE, the middle one, {rates[middle]:g}",
          {name: middle * (name != "base") for name in ("base", *names)})
    lines += gradient_table(results["gradient"])
    lines += ["", "PREDICTIONS and what became of them, in points (open: the interval allows both)"]
    for text, objectives, key, where in PREDICTIONS if seeds >= 3 and first == "sft" else ():
        found = []
        for name in (name for name in objectives if name in names):
            over_rates = (c[name][key] - c[first][key])[:, 1:].mean(1)
            values = over_rates if where == "rates" else differences[name]
            average, low, high = seed_interval(values)
            held, failed = (high < 0, low > 0) if where != "near" else (
                -0.05 < low and high < 0.05, low > 0.05 or high < -0.05)
            verdict = "no gap" if math.isnan(average) else "held" if held else "failed" if failed else "open"
            found.append(f"{name} {verdict} ({cell(values, 100, 0)})")
        lines += [f"- {text}", "  " + ("; ".join(found) or "not trained")]
    if seeds < 3 or first != "sft":
        lines.append("They need three seeds, and sft among the objectives.")
    return "\n".join([*lines, ""])


@torch.no_grad()
def gradient_items(model, samples, objectives, group_size=256, dtype=torch.float32):
    """How hard each objective pushes each response token: {"p": (N,) p_t, "C": (N,) C_b of its sample, objective: (N,)
    |d loss / d logit| of the token's own logit in a batch of its sample alone, times n_b (both averages divide by it)}.

    By autograd through `bft.loss_from_logits`, and C by its definition, so that theory has something to be compared
    with: sft 1 - p, dft and bft-token p (1 - p), bft (1 - C) p (1 - p). Over all logits absolute values add up to twice
    that.
    """
    device, out = next(model.parameters()).device, {key: [] for key in ("p", "C", *objectives)}
    for x in samples:
        ids = torch.from_numpy(x.ids)[None].to(device)                    # (1, T)
        labels = torch.where(torch.from_numpy(x.response).to(device), ids, -100)
        with autocast(device, dtype):
            logits = model(ids).float()                                   # (1, T, V)
        at = (labels[0, 1:] != -100).nonzero()[:, 0]                      # (n_b,) what predicts the response tokens
        own, n = (0, at, ids[0, at + 1]), len(at)
        logp, g = logits.log_softmax(-1)[own].double().cpu().numpy(), min(group_size, n)
        out["p"] += np.exp(logp).tolist()
        out["C"] += [float(np.exp(np.convolve(logp, np.full(g, 1 / g), "valid").min()))] * n
        for name in objectives:
            with torch.enable_grad():
                loss = bft.loss_from_logits(logits.requires_grad_(), labels, name, group_size)
                gradient, = torch.autograd.grad(loss, logits)
            out[name] += (gradient[own].abs() * n).tolist()
    return {key: [float(f"{v:.4g}") for v in values] for key, values in out.items()}


# |d loss / d logit| of a token by its p and its sample's C, where it is known without a measurement.
THEORY = {"sft": lambda p, C: 1 - p, "dft": lambda p, C: p * (1 - p), "bft": lambda p, C: (1 - C) * p * (1 - p)}
P_EDGES = (0, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 1)


def gradient_table(gradient):
    """Lines of text: `gradient_items` by bucket of p, beside the theory; bft's also by thirds of C."""
    g = {key: np.array(values) for key, values in gradient.items()}
    p, C, names = g["p"], g["C"], [key for key in g if key not in ("p", "C")]
    bucket = np.digitize(p, P_EDGES[1:-1])
    lines = ["", f"GRADIENT: |d loss / d logit| of a response token, times n_b, at the first base ({len(p)} tokens): "
             "measured (theory) share of all.",
             "Within a sample sft-sample pushes as sft does, bft-token as dft, bft-tokavg as bft.",
             "p".ljust(12) + "tokens".rjust(7) + "".join(name.rjust(max(20, len(name) + 1)) for name in names)]
    for b, (low, high) in enumerate(itertools.pairwise(P_EDGES)):
        row, here = f"{low:g} to {high:g}".ljust(12) + f"{(bucket == b).mean():7.1%}", bucket == b
        for name in names if here.any() else ():
            theory = f" ({THEORY[name](p, C)[here].mean():.3f})" if name in THEORY else ""
            row += f"{g[name][here].mean():.3f}{theory}{g[name][here].sum() / g[name].sum():5.0%}".rjust(
                max(20, len(name) + 1))
        lines.append(row)
    if "bft" in g:
        edges = [0, *np.quantile(C, (1 / 3, 2 / 3)), 1]
        lines += ["bft, by its sample's minimum group confidence C as well: measured (theory)",
                  "p".ljust(12) + "".join(f"C {a:.3f} to {b:.3f}".rjust(22) for a, b in itertools.pairwise(edges))]
        third = np.digitize(C, edges[1:-1])
        for b, (low, high) in enumerate(itertools.pairwise(P_EDGES)):
            cells = [(bucket == b) & (third == k) for k in range(3)]
            lines.append(f"{low:g} to {high:g}".ljust(12) + "".join(
                (f"{g['bft'][x].mean():.4f} ({THEORY['bft'](p, C)[x].mean():.4f})" if x.any() else "-").rjust(22)
                for x in cells))
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# Pictures

# Okabe and Ito's colours, which the colour-blind can tell apart, and a marker each.
LOOK = {"sft": ("#000000", "o"), "bft": ("#D55E00", "s"), "bft-token": ("#0072B2", "^"), "bft-v3": ("#009E73", "D"),
        "sft-sample": ("#999999", "v"), "dft": ("#CC79A7", "P"), "bft-sample": ("#56B4E9", "X"),
        "bft-tokavg": ("#E69F00", "p")}


def read_metrics(path, last=math.inf):
    """The lines of a metrics.jsonl up to step `last`, without what a crash left of one."""
    lines = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
            if (row := json.loads(line))["step"] <= last:
                lines.append(row)
    return lines


def plot(paths, out):
    """Draws what directories hold, into files beside `out`; returns their paths. A directory of the default job gives
    its frontiers and gradients, runs (or a directory of runs) give their training curves, all on the same axes. Raises
    UserError."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except Exception as e:                                                # not there, or not fit for this numpy
        raise UserError(f'pictures need matplotlib ({e}): pip install -e ".[plot]"') from None
    out, runs, drawn, files, found = Path(out), {}, [], [], []
    for path in map(Path, paths):
        whole = any((path / name).is_file() for name in ("metrics.jsonl", "results.json"))
        found += [path] if whole else sorted(p.parent for p in path.glob("*/metrics.jsonl")) or [path]
    jobs = [path for path in found if not (path / "metrics.jsonl").is_file()]
    try:
        for path in found:
            if path not in jobs:
                runs[os.path.relpath(path)] = read_metrics(path / "metrics.jsonl")
                continue
            results = json.loads((path / "results.json").read_text())
            where = f"{jobs.index(path) + 1}-" if len(jobs) > 1 else ""
            drawn.append((f"{where}frontier", draw_frontier(plt, results)))
            drawn.append((f"{where}gradient", draw_gradient(plt, results["gradient"])))
        path = ", ".join(runs)
        if runs:
            drawn.append(("curves", draw_curves(plt, runs)))
    except Exception as e:                                                # whatever a damaged file leads to
        raise UserError(f"{path}: {type(e).__name__} ({e}); expected runs with a step in metrics.jsonl, or what "
                        "`python train.py` left") from None
    for kind, figure in drawn:
        files.append(out.with_name(f"{out.stem}-{kind}.png"))
        with replacing(files[-1]) as f:
            figure.savefig(f, format="png", dpi=150)
        plt.close(figure)
    return files


def draw_frontier(plt, results):
    """Novel facts learned against wrong labels followed, and against accuracy lost: a curve for each objective from the
    base over its learning rates, the mean over seeds; a small mark for each seed."""
    c, seeds, rates = rate_curves(results), results["seeds"], [f"{lr:g}" for lr in results["lrs"]]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    for ax, key, label in ((axes[0], FOLLOWED, "planted wrong labels followed, %"),
                           (axes[1], LOST, "held-out accuracy lost, points")):
        for name, measured in c.items():
            x, y = 100 * measured[NOVEL], 100 * measured[key]
            colour, marker = LOOK.get(name, (None, "o"))
            line, = ax.plot(x.mean(0), y.mean(0), color=colour, marker=marker, label=name, zorder=3)
            ax.scatter(x[:, 1:], y[:, 1:], s=9, color=line.get_color(), marker=marker, alpha=0.35, linewidth=0)
        ax.plot(x[:, 0].mean(), y[:, 0].mean(), "*", color="gold", markeredgecolor="black", markersize=16, zorder=4,
                label="base")
        ax.set(xlabel="novel facts right, % (chance 25)", ylabel=label)
        ax.grid(alpha=0.3)
    lines = [", ".join(rates[i:i + 3]) for i in range(0, len(rates), 3)]
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False,
                  title="From the base through\nlearning rates\n" + ",\n".join(lines))
    figure.suptitle(f"Further right and further down is better. Means over seeds ({len(seeds)}); small marks are seeds")
    return figure


def draw_gradient(plt, gradient):
    """|d loss / d logit| of each token against its p, measured; lines are the theory."""
    g = {key: np.array(values) for key, values in gradient.items()}
    p, C, names = g["p"], g["C"], [key for key in g if key not in ("p", "C")]
    figure, axes = plt.subplots(1, len(names), figsize=(3.3 * len(names), 3.6), layout="constrained", squeeze=False,
                                sharey=True)
    grid = np.linspace(0, 1, 200)
    for ax, name in zip(axes[0], names):
        for quantile, style in zip((0.5, 0.1, 0.9)[:(3 if name == "bft" else 1) * (name in THEORY)], ("--", "-", ":")):
            level = np.quantile(C, quantile)
            ax.plot(grid, THEORY[name](grid, level), color="black", linewidth=1.2, linestyle=style, zorder=4,
                    label=f"theory, C = {level:.2f}" if name == "bft" else "theory")
        dots = ax.scatter(p, g[name], s=3, c=C, cmap="viridis", vmin=0, vmax=1, linewidth=0, zorder=3, rasterized=True)
        ax.set(title=name, xlabel="p of the token")
        ax.grid(alpha=0.3)
        if name in THEORY:
            ax.legend(fontsize="small")
    axes[0, 0].set_ylabel("|d loss / d logit| x n_b")
    figure.colorbar(dots, label="C of its sample")
    return figure


def draw_curves(plt, runs):
    """What every run logs in the same unit, whatever its loss. runs: {name: lines of metrics.jsonl}."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained", sharex=True)
    common, last = os.path.commonpath(runs) if len(runs) > 1 else "", [Path(run).name for run in runs]
    own = len(set(last)) == len(last) and set(last) <= set(LOOK)          # each is named by its objective
    for ax, key, label in zip(axes.flat, ("nll", "confidence", "min_group_confidence", "grad_norm"), (
            "NLL, nats per response token", "mean confidence (p)", "mean minimum group confidence (C)",
            "gradient norm, before clipping")):
        for number, (name, lines) in enumerate(runs.items()):             # (every other one dashed: they may coincide)
            x, y = np.array([(line["step"], line[key]) for line in lines if "loss" in line]).T
            shown, many = os.path.relpath(name, common) if common else name, len(x) > 100
            line, = ax.plot(x, y, linewidth=0.8, alpha=0.35 if many else 1, label=None if many else shown,
                            color=LOOK[Path(name).name][0] if own else None, linestyle="-" if number % 2 == 0 else "--")
            if many:                                                      # and the running mean
                width = len(x) // 50
                ax.plot(x[width - 1:], np.convolve(y, np.full(width, 1 / width), "valid"), color=line.get_color(),
                        label=shown)
            val = [(r["step"], r["val_nll"]) for r in lines if "val_nll" in r] if key == "nll" else []
            if val:
                ax.plot(*zip(*val), "o--", color=line.get_color(), markersize=4, label=f"{shown}, validation")
        ax.set(ylabel=label, yscale="log" if key == "grad_norm" else "linear")
        ax.grid(alpha=0.3)
    for ax in axes[1]:
        ax.set_xlabel("step")
    axes[0, 0].legend(fontsize="small")
    figure.suptitle(common)
    return figure


# ---------------------------------------------------------------------------------------------------------------------

def find_device(name):
    """The torch.device of --device. Raises UserError if it cannot be used here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":                                                    # one for each of torchrun's processes
        local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if local > torch.cuda.device_count():
            raise UserError(f"{local} processes on this node, which has {torch.cuda.device_count()} CUDA devices; "
                            "expected one for each (--nproc_per_node), or --device cpu")
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise TypeError("expected cpu or cuda")
        torch.empty(1, dtype=torch.float64, device=device)                # the objectives compute in float64
    except (RuntimeError, AssertionError, TypeError) as e:
        raise UserError(f"--device {name} cannot be used here: {str(e).splitlines()[0]}") from None
    return device


class Ranks:
    """Who we are among the processes of torchrun; one process by itself is rank 0 of 1."""

    def __init__(self, device):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = find_device(device)
        self.quiet, self.said = False, set()                              # quiet: in the default job's many trainings

    def start(self):
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.world > 1:
            try:
                store, rank, world = next(dist.rendezvous("env://"))
            except ValueError as e:
                raise UserError(f"WORLD_SIZE is {self.world}, but {e}; expected to be started by torchrun") from None
            if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":            # torchrun restarts with the store as it was,
                restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")   # where dead processes' addresses are
                store = dist.PrefixStore(f"restart {restart}", store)     # (each node counts for itself)
            dist.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo", store=store,
                                    rank=rank, world_size=world)

    def print(self, *words):
        if self.rank == 0:
            with contextlib.suppress(BrokenPipeError):                    # no one reads any more; the run goes on
                print(*words, flush=True)

    def progress(self, *words):
        if not self.quiet:
            self.print(*words)

    def once(self, words):
        if words not in self.said:
            self.said.add(words)
            self.print(words)

    def largest(self, number):
        """The largest of the integers that the ranks bring, over gloo: no GPU is waited for."""
        number = torch.tensor(number, dtype=torch.int64)
        if self.world > 1:
            dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number)

    def barrier(self):
        self.largest(0)


def open_model(path, tokenizer=None):
    """(directory, GPTConfig, Tokenizer) of a run, model directory or Hugging Face repository id, the weights unread.
    tokenizer: another one than the directory's. Raises UserError."""
    inside = sorted(p.parents[1] for p in Path(path).glob("*/model/config.json"))
    if inside and not Path(path, "model").is_dir() and not Path(path, "config.json").is_file():
        raise UserError(f"{path} holds several runs; expected some of {', '.join(map(str, inside))}")
    try:
        directory = Path(path) / "model" if Path(path, "model", "config.json").is_file() else find_directory(path)
        weight_files(directory)
        config = read_config(directory)
    except (ValueError, OSError) as e:
        raise UserError(str(e)) from None
    tokenizer = load_tokenizer(tokenizer or directory)
    if tokenizer.n_vocab > config.vocab_size:
        raise UserError(f"{directory}: the tokenizer has {tokenizer.n_vocab} tokens, the model only "
                        f"{config.vocab_size}")
    return directory, config, tokenizer


def load_weights(directory):
    """The GPT of a directory. Raises UserError."""
    try:
        return GPT.from_pretrained(directory)
    except (ValueError, OSError) as e:
        raise UserError(str(e)) from None


def generation_config(directory):
    """The content of generation_config.json, {} if there is none. Raises UserError."""
    path = Path(directory, "generation_config.json")
    try:
        content = json.loads(path.read_bytes()) if path.is_file() else {}
        if not isinstance(content, dict):
            raise ValueError("it is no object")
        return content
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is not a generation configuration that we can read: {e}") from None


def stop_ids(config, generation, tokenizer, chat_format):
    """Every id that ends an answer: those of config.json, generation_config.json, the tokenizer and the chat format."""
    eos = generation.get("eos_token_id")
    eos = [*config.eos_token_ids, *(eos if isinstance(eos, list) else [eos]), tokenizer.eos_id]
    eos += [tokenizer.special[token] for token in CHAT_TOKENS[chat_format][-1:]]
    return list(dict.fromkeys(i for i in eos if type(i) is int))


def expand(names):
    """{column: [paths]} of what the command names: a model alone, or those that a pattern finds. Raises UserError."""
    columns = {}
    for name in names:
        found = [name] if os.path.exists(name) or not glob.has_magic(name) else \
            [path for path in sorted(glob.glob(name)) if os.path.isdir(path)]
        if not found:
            raise UserError(f"no directory fits the pattern {name!r}; expected runs or model directories")
        columns[name] = found
    paths = [path for found in columns.values() for path in found]
    if len(set(map(os.path.normpath, paths))) < len(paths) or len(columns) < len(names):
        raise UserError(f"a model is named twice: {' '.join(paths)}")
    return columns


def read_task(task, file, layout, limit):
    """The items of a task's file, but for samples, which depend on the tokenizer. Raises UserError."""
    if task == "profile":
        return list(read_genes(file).values())[:limit]
    if task == "process":
        return load_items(file, genes="texts", process="text")[:limit]
    items, needed = load_choice(file)[:limit], {"pubmedqa": "context", "mmlu": "subject"}.get(layout)
    most = 26 if layout in ("medqa", "medmcqa", "mmlu") else math.inf
    for item in items:
        if needed and not (isinstance(item.get(needed), str) and item[needed].strip()):
            raise UserError(f"{file}:{item['line']}: --layout {layout} shows {needed!r}; expected some text there")
        if len(item["choices"]) > most:
            raise UserError(f"{file}:{item['line']}: {len(item['choices'])} choices; expected at most 26, as letters")
    return items


def read_genes(file, **keys):
    """{gene: item} of a file of {"gene", ...}. Raises UserError, also for a gene that is there twice: it would be
    learned from and asked about."""
    genes = {}
    for item in load_items(file, gene="text", **keys):
        if item["gene"] in genes:
            raise UserError(f"{file}:{item['line']}: {item['gene']} is on line {genes[item['gene']]['line']} too; "
                            "expected each gene once")
        genes[item["gene"]] = item
    return genes


def arguments():
    """The arguments of the command line. Raises UserError."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="+", help="runs, model directories or Hugging Face repository ids; a pattern "
                        "in quotes, 'runs/bft-s*', is one column: several seeds of one objective")
    parser.add_argument("--tasks", nargs="+", choices=("nll", "choice", "process", "profile", "inspect", "plot"),
                        default=[], help="what to evaluate")
    parser.add_argument("--data", nargs="+", default=[], help="a file for each task, in the same order")
    parser.add_argument("--limit", type=int, help="of each file in --data, but inspect's, the first so many lines "
                        "(default: all)")
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=["cloze"], help="how choice questions are "
                        "asked, one for all or one for each choice task: those with names of data sets as "
                        "lm-evaluation-harness asks them; cloze shows no choices (default: cloze)")
    parser.add_argument("--chat", action="store_true", help="ask choice questions in the chat format, not plain")
    parser.add_argument("--encoder", nargs="+", default=["self"], help="of process and profile: sentence-transformers "
                        "directories or repository ids, or self: the model's own mean last hidden state (default: "
                        "self)")
    parser.add_argument("--candidates", help="of process: a file with 'process' on each line, further names that the "
                        "true one is compared with; without: those of --data alone")
    parser.add_argument("--labels", nargs="+", default=[], help="of profile: files of {gene, label}, a property each")
    parser.add_argument("--embeddings", nargs="+", default=[], help="of profile: files of {gene, embedding}, a column "
                        "each")
    parser.add_argument("--template", help="what process or profile asks, with a line's keys in braces, as {gene}")
    parser.add_argument("--lines", nargs="+", type=int, default=[], help="of the inspect task's file, which samples to "
                        "show (default: the first four)")
    parser.add_argument("--prompt", help="print each model's answer to this")
    parser.add_argument("--max-new-tokens", type=int, help="of an answer (default: "
                        f"{', '.join(f'{n} for {task}' for task, n in NEW_TOKENS.items())})")
    parser.add_argument("--temperature", type=float, default=0.0, help="of an answer; 0: greedy (default: 0)")
    parser.add_argument("--seed", type=int, default=0, help="of an answer that is drawn (default: 0)")
    parser.add_argument("--out", default="results.json",
                        help="where the table and the per-item scores go, pages and pictures beside it (default: "
                        "results.json)")
    parser.add_argument("--tokenizer", help="directory with tokenizer.json, or a tiktoken name; without: the model's")
    parser.add_argument("--chat-format", choices=("auto", *CHAT_FORMATS), default="auto", help="of samples and "
                        "prompts; auto: the one whose special tokens the tokenizer has (default: auto)")
    parser.add_argument("--max-length", type=int, help="cut samples after so many tokens; without: where "
                        " the model's positions end")
    parser.add_argument("--group-size", type=int, default=256, help="g, in response tokens (default: 256)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="float32",
                        help="autocast; auto: bfloat16 where the device has it natively (default: float32)")
    parser.add_argument("--device", default="auto", help="auto: cuda if there is one, else cpu")
    args = parser.parse_args()
    tasks = set(args.tasks)
    if not tasks and args.prompt is None:
        raise UserError("nothing to do; expected --tasks and --data, or --prompt")
    if "plot" in tasks and (len(args.tasks) > 1 or args.data or args.prompt is not None):
        raise UserError("--tasks plot draws what runs have logged; expected no other task, no --data and no --prompt")
    if len(args.data) != len(args.tasks) and args.tasks != ["plot"]:
        raise UserError(f"--data names {len(args.data)} files for {len(args.tasks)} tasks; expected one for each")
    for flag, of in (("layout", "choice"), ("chat", "choice"), ("candidates", "process"), ("labels", "profile"), (
            "embeddings", "profile"), ("encoder", "process profile"), ("template", "process profile"), (
            "lines", "inspect")):
        if getattr(args, flag) != parser.get_default(flag) and not tasks & set(of.split()):
            raise UserError(f"--{flag} is of {of.replace(' ', ' and ')} alone; expected that in --tasks")
    if "profile" in tasks and not args.labels:
        raise UserError("the profile task needs --labels; expected files of {gene, label}, a property each")
    if args.template is not None and TEMPLATES.keys() <= tasks:
        raise UserError("--template is what one task asks; expected process or profile in --tasks, and not both")
    if len(args.layout) not in (1, args.tasks.count("choice")):
        raise UserError(f"--layout names {len(args.layout)} for {args.tasks.count('choice')} choice tasks; expected "
                        "one, or one for each")
    if not 0 <= args.temperature < math.inf or not 0 <= args.seed < 2 ** 32:
        raise UserError(f"--temperature is {args.temperature} and --seed {args.seed}; expected 0 or more each")
    for name in ("group_size", "max_length", "max_new_tokens", "limit"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}; expected at least 1")
    for name in ("encoder", "labels", "embeddings"):
        if len(set(getattr(args, name))) < len(getattr(args, name)):
            raise UserError(f"--{name} names one twice: {' '.join(getattr(args, name))}")
    out = Path(args.out).resolve()
    if not os.access(out.parent, os.W_OK | os.X_OK) or out.is_dir():
        raise UserError(f"--out {args.out}: expected a file in a directory that is there and can be written to")
    return args


def main():
    args = arguments()
    tasks = set(args.tasks)
    if args.tasks == ["plot"]:
        for path in plot(args.models, args.out):
            print(f"picture: {path}")
        return
    ranks = Ranks(args.device)
    ranks.start()
    device = ranks.device
    dtype, columns = compute_dtype(args.dtype, device), expand(args.models)
    opened = {path: open_model(path, args.tokenizer) for paths in columns.values() for path in paths}
    formats = {path: find_format(args.chat_format, tokenizer) for path, (_, _, tokenizer) in opened.items()}
    # Every file is read, and every library found, before any model.
    jobs = list(enumerate(zip(args.tasks, args.data)))
    asked = [i for i, (task, _) in jobs if task == "choice"]
    layouts = dict(zip(asked, args.layout * len(asked) if len(args.layout) == 1 else args.layout))
    items = {i: read_task(task, file, layouts.get(i), args.limit) for i, (task, file) in jobs
             if task not in ("nll", "inspect")}
    stems = [Path(file).stem for file in args.labels]                     # what the properties are called
    labels = {file if stems.count(stem) > 1 else stem: {gene: x["label"] for gene, x in read_genes(
        file, label="label").items()} for file, stem in zip(args.labels, stems)}
    given = {file: {gene: x["embedding"] for gene, x in read_genes(file, embedding="numbers").items()}
             for file in args.embeddings}
    further = [x["process"] for x in load_items(args.candidates, process="text")] if args.candidates else []
    encoders, folds, prompts = dict.fromkeys(args.encoder), {}, {}
    for i, (task, file) in jobs:
        if task == "profile":
            kept = [x for x in items[i] if all(x["gene"] in vectors for vectors in given.values())]
            if len(kept) < len(items[i]):
                ranks.print(f"{len(kept)} of {len(items[i])} genes of {file} are in all of {' '.join(given)}")
            items[i] = kept
        if task in TEMPLATES:
            prompts[i] = [fill(args.template or TEMPLATES[task], x) for x in items[i]]
        if task == "profile":
            folds[i] = make_folds([x["gene"] for x in items[i]], labels)
        if task == "process":
            rouge_items([], [])                                           # finds its library, or says so now
            if len(candidates(items[i], further)) < 2:
                raise UserError(f"{file}: one name is compared with no other; expected two, or --candidates")
    if prompts and ranks.rank == 0:
        encoders = {name: None if name == "self" else load_encoder(name, device) for name in encoders}
    if args.prompt is not None:
        prompts["prompt"] = [args.prompt]
    room = {i: args.max_new_tokens or NEW_TOKENS[i if i == "prompt" else args.tasks[i]] for i in prompts}
    sets, cuts, first = {}, {}, next(iter(opened))                        # cuts: where samples end, None: nowhere
    for path, (directory, config, tokenizer) in opened.items():
        turns = args.chat or prompts or tasks & {"nll", "inspect"}
        if turns and ranks.rank == 0 and (difference := compare_template(directory, tokenizer, formats[path])):
            print(f"warning: {difference}")
        for i, texts in prompts.items():
            sets[path, i] = [encode_turns([("user", text), ("assistant", None)], tokenizer, formats[path])[0]
                             for text in texts]
            for number, ids in enumerate(sets[path, i]):
                if len(ids) + room[i] > config.max_positions:
                    where = "--prompt" if i == "prompt" else f"the prompt of {args.data[i]}:{items[i][number]['line']}"
                    raise UserError(f"{path}: {where} has {len(ids)} tokens; expected, with {room[i]} new ones, at "
                                    f"most the {config.max_positions} positions of the model")
        for i, (task, file) in jobs:
            if i in items:
                continue
            longest = args.max_length or config.max_positions
            samples, counts = load_samples(file, tokenizer, formats[path], longest)
            cuts.setdefault(i, set()).add(longest if counts["cut"] else None)
            ranks.print(f"{path}: {counts['cut']} of {file} cut at {longest} tokens, {counts['dropped']} dropped")
            if task == "inspect":
                samples = [s for s in samples if s.line in args.lines] if args.lines else samples[:4]
                if lacking := set(args.lines) - {s.line for s in samples}:
                    raise UserError(f"{file}: --lines: there is no sample on line {min(lacking)}")
            else:
                samples = samples[:args.limit]
            if [s.line for s in samples] != [s.line for s in sets.get((first, i), samples)] or len(cuts[i]) > 1:
                raise UserError(f"{file}: {path} and {first} keep different samples, or parts of them, within their "
                                "positions; expected a --max-length that both have, to compare them on the same ones")
            if task == "nll" and tokenizer.bytes != opened[first][2].bytes:
                ranks.print(f"warning: {path} and {first} have different tokens: NLL per token cannot be compared")
            sets[path, i] = samples
    results = [{} for _ in jobs]
    for path, (directory, config, tokenizer) in opened.items():           # one model at a time in memory
        model = load_weights(directory).cast(dtype).to(device)
        stop = stop_ids(config, generation_config(directory), tokenizer, formats[path])
        drawn = args.temperature, args.seed, dtype
        if args.prompt is not None:
            answer, = write_texts(model, tokenizer, sets[path, "prompt"], stop, room["prompt"], *drawn)
            ranks.print(f"--- {path} ({formats[path]})\n{answer}")
        for i, (task, file) in jobs:
            start = time.monotonic()
            if task == "nll":
                done = nll_items(model, sets[path, i], dtype, args.group_size)
            elif task == "inspect":
                done = inspect_items(model, tokenizer, sets[path, i], dtype, args.group_size)
            elif task == "choice":
                done = choice_items(model, tokenizer, items[i], dtype, layouts[i], args.chat and formats[path])
                if cut := sum(x["cut"] > 0 for x in done):
                    ranks.print(f"warning: {path}: {cut} of {len(done)} questions of {file} are longer than its "
                                f"{config.max_positions} positions and lost their beginning")
            else:
                texts = write_texts(model, tokenizer, sets[path, i], stop, room[i], *drawn)
                own, names = ([process_name(text) for text in texts], candidates(items[i], further)) \
                    if task == "process" else (texts, [x["gene"] for x in items[i]])
                if empty := sum(not text.strip() for text in own):
                    ranks.print(f"warning: {path}: {empty} of {len(texts)} answers to {file} are empty")
                done = texts, [embed_self(model, tokenizer, x, dtype) for x in (own, names) if "self" in encoders]
            results[i][path] = done
            ranks.print(f"{path}: {task} of {file}, {time.monotonic() - start:.0f} s")
        del model                                                         # before the next one is read
    if ranks.rank or not jobs:
        return
    output, asked_in = {"models": columns, "tasks": []}, " and ".join(sorted(set(formats.values())))
    for i, (task, file) in jobs:
        entry, result = {"task": task, "data": file}, results[i]
        if task == "choice":
            answers = [x["answer"] for x in items[i]]
            entry |= {"layout": layouts[i], "chat": args.chat and asked_in,
                      "majority": max(map(answers.count, set(answers))) / len(answers)}
        if task == "process":
            result = process_items(items[i], further, result, encoders)
        if task == "profile":
            genes, written = [x["gene"] for x in items[i]], result
            features = profile_features(genes, given, written, columns, encoders)
            entry["rows"], entry["properties"] = profile_rows(genes, folds[i], features)
            result = {path: [{"line": x["line"], "gene": x["gene"], "text": text} for x, text in zip(items[i], texts)]
                      for path, (texts, _) in written.items()}
        else:
            entry["rows"] = summarise(measures(task, encoders), {name: [result[path] for path in paths]
                                                                 for name, paths in columns.items()})
            for row in entry["rows"]:
                if row["measure"] == "cosine self":                       # angles in two spaces have no difference
                    row["pairs"] = []
        output["tasks"].append({**entry, "items": result})
        if task == "inspect":
            page = Path(args.out).with_suffix(".html")
            write_whole(page, [inspect_page(result, args.group_size).encode(errors="replace")])
            print(f"page: {page}")
    write_whole(Path(args.out), [json.dumps(output, indent=1).encode()])
    for t in output["tasks"]:
        if t["rows"]:
            how = f", {t['layout']} layout, {t['chat'] or 'no'} chat format (always the most frequent answer: " \
                f"{t['majority']:.1%})" if t["task"] == "choice" else f", {asked_in} chat format"
            print_table(t["rows"], f"{t['task']}: {t['data']}{how}")
    if any(t["rows"] for t in output["tasks"]):
        print("\nIn brackets 95% intervals: of one model over items; of several seeds over seeds (over items where all "
              "agree); of\ndifferences, the column's value minus the named one's, over the same items, and over seeds."
              + " \u00b1: sd over folds; the intervals hold the classifiers fixed." * ("profile" in tasks))
    print(f"per-item scores: {args.out}")


if __name__ == "__main__":
    run(main)
