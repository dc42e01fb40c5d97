"""The `profile` task: the model describes each gene; how well embeddings of the descriptions predict properties."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from runtime.process import UserError
from runtime.progress import with_progress
from tasks import Answers, writing
from tasks.items import load_genes
from tasks.statistics import Estimate, compare, resample_counts, resamples


TEMPLATE = ("Describe the human gene {gene}: what kind of protein it encodes, the molecular function of this protein, "
            "the processes it takes part in, and where in the cell it is found.")
NEW_TOKENS = 192
FOLDS = 5
# Headings of rows with embeddings by the model itself.
OWN_PROFILES = "profile, self"
OWN_NAMES = "gene name, self"


class Folds(NamedTuple):
    """One property, and how its genes are divided."""
    genes: Any                       # (S,) indices of the genes that have a label
    labels: Any                      # (S,) 0 or 1
    fold: Any                        # (S,) 0 to FOLDS - 1


class Questions(NamedTuple):
    file: str
    items: list                      # {"gene", "line", ...} each
    prompts: writing.Prompts
    given: dict                      # {file of --embeddings: {gene: vector}}
    folds: dict                      # {property: Folds}
    encoders: dict                   # of `writing.load_encoders`


def add_flags(parser):
    writing.add_flags(parser)
    parser.add_argument("--labels", nargs="+", default=[], help="of profile: files of {gene, label}, a property each")
    parser.add_argument("--embeddings", nargs="+", default=[], help="of profile: files of {gene, embedding}, a column "
                        "each")


def check_flags(args):
    if not args.labels:
        raise UserError("the profile task needs --labels; expected files of {gene, label}, a property each")
    writing.check_flags(args)
    writing.refuse_twice("--labels", args.labels)
    writing.refuse_twice("--embeddings", args.embeddings)


# ---------------------------------------------------------------------------------------------------------------------
# What is asked

def read(file, number, evaluation):
    args = evaluation.args
    items = list(load_genes(file).values())[:args.limit]
    labels = load_labels(args.labels)
    given = {}
    for vectors_file in args.embeddings:
        genes = load_genes(vectors_file, embedding="numbers")
        given[vectors_file] = {gene: item["embedding"] for gene, item in genes.items()}
    kept = [item for item in items if all(item["gene"] in vectors for vectors in given.values())]
    if len(kept) < len(items):
        evaluation.ranks.print(f"{len(kept)} of {len(items)} genes of {file} are in all of {' '.join(given)}")
    prompts = writing.encode_items(file, kept, TEMPLATE, NEW_TOKENS, evaluation)
    folds = make_folds([item["gene"] for item in kept], labels)
    return Questions(file, kept, prompts, given, folds, writing.load_encoders(evaluation))


def load_labels(files):
    """{property: {gene: 0 or 1}}. A property is called as its file, without the directory where that is enough."""
    stems = [Path(file).stem for file in files]
    labels = {}
    for file, stem in zip(files, stems):
        name = file if stems.count(stem) > 1 else stem
        labels[name] = {gene: item["label"] for gene, item in load_genes(file, label="label").items()}
    return labels


def make_folds(genes, labels):
    """Stratified folds for each property, the same ones for everybody: {property: Folds} of labels {property: {gene: 0
    or 1}}. Raises UserError."""
    try:
        from sklearn.model_selection import StratifiedKFold
    except ImportError as e:
        raise UserError(f'the profile task needs scikit-learn ({e}): pip install -e ".[eval]"') from None
    folds = {}
    for name, label in labels.items():
        known = np.array([i for i, gene in enumerate(genes) if gene in label], dtype=int)
        y = np.array([label[genes[i]] for i in known], dtype=int)
        if min((y == 0).sum(), (y == 1).sum()) < FOLDS:
            raise UserError(f"{name}: of the {len(genes)} genes in --data {(y == 1).sum()} have label 1 there and "
                            f"{(y == 0).sum()} label 0; expected at least {FOLDS} of each, for {FOLDS} folds")
        fold = np.empty(len(known), dtype=int)
        splits = StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(y, y)
        for k, (_, test) in enumerate(splits):
            fold[test] = k
        folds[name] = Folds(known, y, fold)
    return folds


def ask(questions, model, opened, evaluation):
    label = f"{opened.path}: profile of {questions.file}"
    written = writing.write_answers(questions.prompts, model, opened, evaluation, label)
    texts = [answer.answer() for answer in written]
    writing.warn_of_empty(texts, questions.file, opened, evaluation)
    items = [{"line": item["line"], "gene": item["gene"], "text": text} for item, text in zip(questions.items, texts)]
    vectors = {}
    if "self" in questions.encoders:
        genes = [item["gene"] for item in items]
        vectors[OWN_PROFILES] = writing.embed_self(model, opened.tokenizer, texts, evaluation.dtype, label)
        vectors[OWN_NAMES] = writing.embed_self(model, opened.tokenizer, genes, evaluation.dtype, label)
    return Answers(items, vectors)


# ---------------------------------------------------------------------------------------------------------------------
# What embeddings predict

def finish(questions, answers, evaluation):
    """Every gene's score by a classifier that did not see it: {"properties": [...]}."""
    features = make_features(questions, answers, evaluation.columns)
    genes = [item["gene"] for item in questions.items]
    properties = []
    for name, folds in with_progress(list(questions.folds.items()), f"profile of {questions.file}: classifiers"):
        # Files are in the rows of every encoder: each matrix is scored once.
        known = {}
        scores = {}
        for heading, columns in features.items():
            scores[heading] = {}
            for column, matrices in columns.items():
                for matrix in matrices:
                    if id(matrix) not in known:
                        known[id(matrix)] = out_of_fold(matrix[folds.genes], folds.labels, folds.fold).tolist()
                scores[heading][column] = [known[id(matrix)] for matrix in matrices]
        properties.append({
            "property": name,
            "genes": [genes[i] for i in folds.genes],
            "labels": folds.labels.tolist(),
            "fold": folds.fold.tolist(),
            "scores": scores,
        })
    return {"properties": properties}


def make_features(questions, answers, columns):
    """{heading: {column: [vectors (S, d), one of each seed]}}. Beside the models' columns stand controls: the bare
    names of the genes, random vectors, and files of --embeddings."""
    genes = [item["gene"] for item in questions.items]
    given = {file: [np.array([vectors[gene] for gene in genes])] for file, vectors in questions.given.items()}
    features = {}
    for encoder, encode in questions.encoders.items():
        described = {}               # {path: (S, d)}
        for path, (items, vectors) in answers.items():
            described[path] = encode([item["text"] for item in items]) if encode else vectors[OWN_PROFILES]
        models = {column: [described[path] for path in paths] for column, paths in columns.items()}
        first_column = next(iter(models.values()))
        shape = first_column[0].shape
        controls = {"random vectors": [np.random.RandomState(seed).normal(size=shape) for seed in range(5)]}
        if encode:
            controls["gene names"] = [encode(genes)]
        else:
            # Each model has its own.
            features[OWN_NAMES] = {column: [answers[path].vectors[OWN_NAMES] for path in paths]
                                   for column, paths in columns.items()}
        features[f"profile, {encoder}"] = {**controls, **given, **models}
    return features


def out_of_fold(vectors, labels, fold):
    """Each gene's score by a logistic regression (standardised features, C = 1) on the other folds. vectors (S, d),
    labels and fold (S,) -> (S,)."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    scores = np.empty(len(labels))
    for k in np.unique(fold):
        classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
        classifier.fit(vectors[fold != k], labels[fold != k])
        scores[fold == k] = classifier.decision_function(vectors[fold == k])
    return scores


# ---------------------------------------------------------------------------------------------------------------------
# The table

def rows(questions, answers, details, evaluation):
    title = f"profile: {questions.file}, {evaluation.chat_formats()} chat format"
    found = []
    for entry in with_progress(details["properties"], f"profile of {questions.file}: intervals"):
        found += property_rows(entry)
    return title, found


def property_rows(entry):
    """Rows, as `statistics.summarise` makes them, of one property of `finish`: ROC-AUC, mean and sd over the folds.

    Resamples of the genes do not fit anything again: intervals hold the classifiers fixed, and are too narrow by that.
    """
    labels, fold = np.array(entry["labels"]), np.array(entry["fold"])
    # The same scores may stand under several headings.
    distinct = {tuple(seed) for columns in entry["scores"].values() for seeds in columns.values() for seed in seeds}
    areas = {scores: fold_auc(np.array(scores), labels, fold) for scores in distinct}           # (F,) each
    resampled = resampled_auc(list(distinct), labels, fold)
    estimates = {}                   # {heading: {column: [Estimate, of each seed]}}
    found = []
    for heading, columns in entry["scores"].items():
        estimates[heading] = {
            column: [Estimate(areas[tuple(seed)].mean(), resampled[tuple(seed)]) for seed in seeds]
            for column, seeds in columns.items()
        }
        row = {"group": entry["property"], "measure": "auc", "heading": heading, "percent": False, "n": len(labels),
               "positive": int(labels.sum()), **compare(estimates[heading])}
        if heading == OWN_PROFILES:
            # Each model's descriptions are also compared with its own names.
            for column, of_names in estimates[OWN_NAMES].items():
                both = {"gene names": of_names, column: estimates[heading][column]}
                row["pairs"] += compare(both)["pairs"]
        for column, cell in row["models"].items():
            spreads = [areas[tuple(seed)].std(ddof=1) for seed in columns[column]]
            cell["sd"] = float(np.mean(spreads))
        found.append(row)
    return found


def fold_auc(scores, labels, fold, counts=None):
    """ROC-AUC in each fold, (F,); with counts (R, S), how often each item was drawn, in each fold of each resample: (F,
    R), nan where a class was not drawn."""
    areas = []
    for k in np.unique(fold):
        positive = np.flatnonzero((fold == k) & (labels == 1))
        negative = np.flatnonzero((fold == k) & (labels == 0))
        a, b = scores[positive][:, None], scores[negative][None]
        wins = (a > b) + 0.5 * (a == b)                                                         # (P, N)
        if counts is None:
            areas.append(wins.mean())
            continue
        p, n = counts[:, positive], counts[:, negative]                                         # (R, P), (R, N)
        with np.errstate(invalid="ignore"):
            areas.append(((p @ wins) * n).sum(1) / (p.sum(1) * n.sum(1)))
    return np.array(areas)


def resampled_auc(distinct, labels, fold):
    """{scores: (RESAMPLES,) mean ROC-AUC over the folds of each resample of the genes} for scores that are tuples."""
    chunks = {scores: [] for scores in distinct}
    for drawn in resamples(len(labels)):
        counts = resample_counts(drawn, len(labels))
        for scores, means in chunks.items():
            areas = fold_auc(np.array(scores), labels, fold, counts)                            # (F, some)
            means.append(np.ma.masked_invalid(areas).mean(0))
    return {scores: np.ma.concatenate(means).filled(np.nan) for scores, means in chunks.items()}
