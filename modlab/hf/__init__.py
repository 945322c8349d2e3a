"""What every part asks of a Hugging Face model: where its parts are, how its layers are called, what its
configs mean."""
