"""Dialogues from anywhere, clean, split, and as rows of token ids."""
