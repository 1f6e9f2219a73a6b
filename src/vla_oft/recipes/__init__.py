"""Named runs. The file name is the registry: `recipes/debug.py` exports `recipe() -> Recipe`, and `vla-oft train debug` runs it.

`base.py` says what a recipe is; files whose name begins with `_` hold what several recipes share.
"""
