"""Dense model in, Mixture-of-Depths model out, in place; and back."""
