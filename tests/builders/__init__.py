"""What tests share: tiny models, adapted layers, references to compare with, and runs. One concept a file."""
