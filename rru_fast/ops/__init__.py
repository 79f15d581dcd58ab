"""The operators as torch.library sees them: schema, fake, autograd, and the kernel each backend names."""

from rru_fast.ops import batch_hard, refine, strip_pool

__all__ = ["batch_hard", "refine", "strip_pool"]
