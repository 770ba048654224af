"""How the quickstart's base model was made: its corpus, its architecture, its training. Users never run it."""
