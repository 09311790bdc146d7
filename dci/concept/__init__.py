"""What a concept is: its modifier tokens, its file, how prompts name it, and what can be done with several."""
