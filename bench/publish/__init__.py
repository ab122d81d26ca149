"""Published text and plots, made of committed rows alone."""
