"""ASFT: DFT with an anchor to the model that the training started from. arXiv 2509.23753.

    w_t = p_t + k (p_ref,t / p_t - 1) 1[|log(p_ref,t / p_t)| <= 10],   k = 0.1           s_b = 1, average over tokens

The loss behind it is p_t l_t (p_t detached) plus k times an estimate of the divergence from the starting model at the
target alone: e^r - r - 1 with r = log p_ref,t - log p_t, whose derivative by log p_t is 1 - e^r. So the gradient is
that of this weight; the value of the loss is another one. At the first step the weight is p_t. A token that has
become e times less probable has some 0.17 more, one that has become e^10 times less probable 2,203.

Source: the authors' code (zhuchichi56/ASFT, train_v2.py at 6f6f51c), with k = 0.1 (0.05 in its README), and NeMo-RL's
PR 3302.

Where it differs: the authors' code has the full divergence, sum_v p_ref,v log(p_ref,v / p_v). That has a gradient for
every token of the vocabulary and is no weight of log p_t, so that it does not fit this table. Ours is the estimator at
the target, as in that PR and in SkyRL, which clamps r to [-10, 10]: beyond, it has no gradient. On tokens of a data set
it estimates neither that divergence nor the reverse one without bias; k does not carry over, says the PR. The authors
divide by the response tokens of a micro-batch.
"""

import torch

import bft


ANCHOR = 0.1
LARGEST = 10.0


def anchored_probability(tokens):
    r = tokens.extra["ref_logp"] - tokens.logp                            # (N,)
    pull = torch.where(r.abs() <= LARGEST, r.expm1(), 0.0)                # (N,)
    return tokens.logp.exp() + ANCHOR * pull                              # (N,)


bft.OBJECTIVES["asft"] = bft.Objective(anchored_probability, bft.every_sample_1, "tokens", needs=("ref_logp",))


if __name__ == "__main__":
    print(bft.worked_example(["asft"]))
