"""Multiple choice by log-likelihood beside lm-evaluation-harness, and beside the matrix products alone.

    pip install -e ".[dev]"
    python bench/evaluate.py                 # SmolLM2's shape; a GPU is used where there is one
    python bench/evaluate.py --dry           # tiny sizes, to see that it runs

All have the same shape (random weights) and the same questions, of lengths spread as real ones: PubMedQA's, whose three
answers are a token each, and MedMCQA's in the cloze layout, whose four are texts. What is timed begins with tokens and
ends with log-likelihoods. lm-eval gets --rows rows at a time. "products alone" are the products with the weights that
our tokens need, in the same micro-batches, and nothing else. Ratios are to ours.
"""

import argparse
import functools
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from measure import SHAPES, heading, interleave, print_rows


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import hf  # noqa: E402
from model import GPT, Linear  # noqa: E402
from runtime.device import find_device  # noqa: E402
from tasks import scoring  # noqa: E402


# Every twentieth of the lengths of 500 PubMedQA questions in SmolLM2's tokens, every tenth of those of 4,183 MedMCQA
# questions, and of their choices.
PUBMEDQA = (106, 189, 226, 243, 260, 274, 296, 303, 314, 324, 338, 350, 366, 377, 390, 404, 425, 443, 473, 508, 684)
MEDMCQA = (5, 11, 12, 14, 15, 16, 19, 22, 28, 42, 172)
CHOICES = (1, 2, 3, 3, 4, 4, 5, 6, 7, 9, 44)


def spread(quantiles, count, rng):
    lengths = np.interp((np.arange(count) + 0.5) / count, np.linspace(0, 1, len(quantiles)), quantiles)
    return rng.permutation(lengths.round().astype(int))


def pubmedqa(vocab, count, rng):
    questions = contexts(PUBMEDQA, vocab, count, rng)
    return [scoring.Request(question, [token]) for question in questions for token in (1, 2, 3)]


def medmcqa(vocab, count, rng):
    choices = iter(contexts(CHOICES, vocab, 4 * count, rng))
    return [scoring.Request(question, next(choices)) for question in contexts(MEDMCQA, vocab, count, rng)
            for _ in range(4)]


def contexts(quantiles, vocab, count, rng):
    return [rng.randint(vocab, size=length).tolist() for length in spread(quantiles, count, rng)]


def our_model(shape, dtype, device):
    model = GPT(hf.config_from_dict(shape)).cast(dtype).to(device)

    def loglikelihood(requests):
        return scoring.loglikelihood(model, requests, dtype)
    return model, loglikelihood


def products_alone(model, sizes, dtype):
    """sizes: of each micro-batch, the tokens that are read, and how many of them are predicted."""
    weights = [module.weight for module in model.layers.modules() if isinstance(module, Linear)]
    most = max(tokens for tokens, _ in sizes)
    x = {width: torch.randn(most, width, dtype=dtype, device=model.head.device)
         for width in {weight.shape[1] for weight in (*weights, model.head)}}

    @torch.no_grad()
    def multiply():
        for tokens, predicted in sizes:
            for weight in weights:
                F.linear(x[weight.shape[1]][:tokens], weight)
            F.linear(x[model.head.shape[1]][:predicted], model.head)
    return multiply


def sizes_of(model, loglikelihood, requests):
    """See `products_alone`."""
    sizes = []
    hook = model.register_forward_pre_hook(lambda _, inputs: sizes.append((len(inputs[0]), len(inputs[2]))))
    loglikelihood(requests)
    hook.remove()
    return sizes


def theirs(shape, dtype, device, rows):
    import tokenizers
    import transformers
    from lm_eval.models.huggingface import HFLM
    config = transformers.AutoConfig.for_model(**shape)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(device, dtype).eval()
    # It wants a tokenizer, and has no use for it.
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<eos>": 0}, unk_token="<eos>"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>")
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=rows)

    def loglikelihood(requests):
        pairs = [(("", ""), request.context, request.continuation) for request in requests]
        return [value for value, _ in lm._loglikelihood_tokens(pairs, disable_tqdm=True)]
    return loglikelihood


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="smollm2")
    parser.add_argument("--questions", type=int, default=40, help="of each kind")
    parser.add_argument("--rows", type=int, default=8, help="of a batch of lm-eval")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dry", action="store_true", help="tiny sizes")
    args = parser.parse_args()
    if args.dry:
        args.shape, args.questions, args.repeats = "dry", 4, 1
    import lm_eval
    import transformers
    device, dtype, shape = find_device(args.device), getattr(torch, args.dtype), SHAPES[args.shape]
    model, ours = our_model(shape, dtype, device)
    lm_evals = theirs(shape, dtype, device, args.rows)
    print(heading(device, transformers, lm_eval))
    print(f"{args.shape}, {args.dtype}, {args.questions} questions of each kind; medians of {args.repeats} interleaved "
          "rounds or more")
    for name, make in (("PubMedQA", pubmedqa), ("MedMCQA", medmcqa)):
        requests = make(shape["vocab_size"], args.questions, np.random.RandomState(0))
        sizes = sizes_of(model, ours, requests)
        result = interleave({"ours": functools.partial(ours, requests),
                             "products alone": products_alone(model, sizes, dtype),
                             "lm-eval": functools.partial(lm_evals, requests)}, args.repeats, device)
        print_rows(f"{name}, {len(requests)} choices", result)
        given = sum(len(request.context) + len(request.continuation) - 1 for request in requests)
        read = sum(tokens for tokens, _ in sizes)
        print(f"tokens read: {read}, of {given} in all questions with each of their choices")


if __name__ == "__main__":
    main()
