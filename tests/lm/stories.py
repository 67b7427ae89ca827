"""Short documents, all different, for the tests to tokenize."""

STORIES = [f"Story {i}: " + " ".join(f"word{i * j % 17}" for j in range(3 + i % 5)) for i in range(40)]
SEPARATOR = "<|end|>"
ODD = "naïve 日本語 🙂\n\ttabs  and   spaces"
