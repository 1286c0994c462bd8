"""Where a result meets the Hub: the model card, and the push."""
