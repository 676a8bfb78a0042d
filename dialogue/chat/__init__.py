"""A model that answers: sampling, decoding, the conversation, the terminal."""
