"""The matcher measured apart from everything else: known warps of real photographs, and the paper's ablations."""
