"""BFT with the exponent of its authors' code. arXiv 2511.21075.

    w_t = p_t                                              s_b = 1 - C_b^gamma, gamma = 1/2, 2
                                                           average over samples

gamma = 1 is bft. Below 1 unsure samples differ more (C = 0.01 and 0.1: 0.90 and 0.68, under bft 0.99 and 0.90), above
1 nearly certain ones do.

Source: the authors' code (TencentAILabHealthcare/BFT, LLaMA-Factory/src/llamafactory/train/trainer_utils.py at
e54ca5c): gamma is the environment variable BFT_CONF_GAMMA, 1 by default, which its README does not name. Values
other than 1 have no figures of its authors; 1/2 and 2 are ours. docs/method.md says in what else the code differs.
"""

import bft


def group_difficulty_to(gamma):
    def weight(tokens):
        C = bft.group_confidence(tokens.logp, tokens.offsets, tokens.group_size)   # (S,)
        return 1 - C ** gamma                                             # (S,)
    return weight


for gamma in (0.5, 2):
    bft.OBJECTIVES[f"bft-gamma-{gamma}"] = bft.Objective(bft.token_probability, group_difficulty_to(gamma), "samples")


if __name__ == "__main__":
    print(bft.worked_example(["bft-gamma-0.5", "bft-gamma-2"]))
