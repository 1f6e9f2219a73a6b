"""Named runs. The file name is the registry: `recipes/debug.py` exports `recipe() -> Recipe`, and `vla-oft train debug` runs it."""
