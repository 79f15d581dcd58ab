"""The operators in plain PyTorch with closed-form backwards: any device, any floating dtype, no autograd graph."""
