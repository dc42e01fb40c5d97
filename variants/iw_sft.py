"""iw-SFT: samples that the model has come to find likelier than it did count for more. arXiv 2507.12856.

    w_t = 1            s_b = clip(exp(T mean_t(log p_t - log p_ref,t)), 0, 16), T = 1            average over tokens

p_ref is p under the weights that the training started from: at the first step every s_b is 1.

Source: the authors' code (emmyqin/iw_sft, bounding_trainers.py at 9a3e4e4). Its class has T = 2 by default, which
its only call replaces by 1: what ran is 1. It divides by the response tokens of the step, as we do, and works with
one sample in a micro-batch alone. The paper's text was not available to us.
"""

import bft


TEMPERATURE = 1.0
LARGEST = 16.0


def gained_likelihood(tokens):
    gain = bft.sample_sums(tokens.logp - tokens.extra["ref_logp"], tokens.offsets)   # (S,)
    n = tokens.offsets.diff().clamp(min=1)                                # (S,)
    return (TEMPERATURE * gain / n).exp().clamp(max=LARGEST)              # (S,)


bft.OBJECTIVES["iw-sft"] = bft.Objective(bft.every_token_1, gained_likelihood, "tokens", needs=("ref_logp",))


if __name__ == "__main__":
    print(bft.worked_example(["iw-sft"]))
