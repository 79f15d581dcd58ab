"""The paper's training model on rru_fast: data, network, losses, evaluation, recipes."""

from build_tools.extras import demand

demand("train", "matplotlib", "PIL", "rich", "safetensors", "tensorboard", "torchvision", "tyro")
