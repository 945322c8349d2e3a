"""What is stored: the ragged KV cache, its bytes, and the arithmetic of stored tokens."""
