"""The subcommands of `t2sda`: one module for each, with a function `run(args)` that gives the exit code. See `cli`."""
