"""What the fork server imports once, so that every worker forked from it has it."""

# torch.optim imports the compiler at an optimizer's first step, whether it compiles or not: 5 s for each worker.
import torch._dynamo  # noqa: F401

import hpo.learn.device
import hpo.learn.trial  # noqa: F401
