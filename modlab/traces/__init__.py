"""The routing of one text, and of many: arrays without a model, to be drawn and stored."""
