"""What happens to a request, one idea per module; `chat.py` tells the story from top to bottom."""
