"""Pure functions of (tensor, generator): class mixing and colour."""
