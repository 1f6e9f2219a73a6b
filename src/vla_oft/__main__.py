"""`python -m vla_oft`, for launchers such as torchrun."""

from vla_oft.cli import main

main()
