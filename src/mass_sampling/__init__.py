"""Mass sampling: what is drawn, by which model, and what is kept of it."""
