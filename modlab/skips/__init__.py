"""What a token may skip: one object for each value of `MoDConfig.skip`, which every other part asks."""
