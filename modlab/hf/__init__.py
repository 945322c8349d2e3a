"""What every part asks of a Hugging Face model: its anatomy, the arguments of its layers, its config."""
