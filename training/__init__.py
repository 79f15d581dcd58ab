"""The paper's training model on rru_fast: data, network, losses, evaluation, recipes."""
