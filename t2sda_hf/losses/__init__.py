"""Pure functions: tensors in, one unweighted number out. Never NaN, no model, no config, no logging."""
