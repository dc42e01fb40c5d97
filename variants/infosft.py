"""InfoSFT: most weight for tokens that are neither known nor hopeless. arXiv 2605.14967.

    w_t = p_t max(0, 1 - logit(p_t) / logit(P))            logit(p) = log p - log(1 - p), P = 0.93
                                                           s_b = 1, average over tokens

Below p = 1/2 the weight is above p. It is largest near p = 0.57, some 0.51, and 0 from P on.

Source: the authors' code (Helloworld10011/InfoSFT, training/infosft_loss.py at f2876a1). All of the weight is detached,
and the sum is divided by the response tokens of the step, as here. For one result its README names epochs of SFT in
between, for which there is no code.
"""

import math

import bft


P = 0.93


def informative(tokens):
    p = tokens.logp.exp()
    # Of p = 1 the logit is infinite and the weight 0.
    logit = tokens.logp - (-tokens.logp.expm1()).log()                    # (N,)
    return p * (1 - logit / math.log(P / (1 - P))).clamp(min=0)           # (N,)


bft.OBJECTIVES["infosft"] = bft.Objective(informative, bft.every_sample_1, "tokens")


if __name__ == "__main__":
    print(bft.worked_example(["infosft"]))
