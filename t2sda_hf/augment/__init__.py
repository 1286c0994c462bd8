"""Pure functions of (tensor, generator): class mixing, colour and patch masks."""
