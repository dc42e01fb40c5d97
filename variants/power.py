"""p to a power: the family with SFT at K = 0 and DFT at K = 1. arXiv 2510.00526.

    w_t = p_t^K                                            s_b = 1, average over tokens

The loss is (1 - p^K) / K, with a gradient through p. That is -p^K times the gradient of log p: the gradient of our
w_t l_t, whose value is another one.

Source: the authors' code (GaotangLi/Beyond-Log-Likelihood, main_verl/trainer/fsdp_sft_trainer.py at 220589d). K = 10
is named in the paper's abstract, 1/2 and 2 are ablations in the code's scripts.

Where it differs: the code divides by the response tokens of a micro-batch, and backpropagates each micro-batch before
it divides by their number. Its gradient is their sum, clipped at 1.
"""

import bft


def power(K):
    def weight(tokens):
        return (K * tokens.logp).exp()                                    # (N,)
    return weight


for K in (0.5, 2, 10):
    bft.OBJECTIVES[f"power-{K}"] = bft.Objective(power(K), bft.every_sample_1, "tokens")


if __name__ == "__main__":
    print(bft.worked_example(["power-0.5", "power-2", "power-10"]))
