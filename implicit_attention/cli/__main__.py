"""`python -m implicit_attention.cli`, as `torchrun -m` and `accelerate launch -m` want it."""

from implicit_attention.cli import main

main()
