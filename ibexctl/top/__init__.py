"""`ibexctl top`: a running node on one screen, again and again."""
