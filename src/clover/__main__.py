"""`python -m clover` is `clover`: what `torchrun -m -- clover` starts."""

from clover.cli import main

main()
