"""Is this machine, this run or this checkpoint in good health? Answers before hours are spent: `vla-oft doctor`."""
