"""What the words of the command line do: one module for each, with `run(args) -> exit code`. See `cli`."""
