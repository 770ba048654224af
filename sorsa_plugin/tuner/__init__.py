"""What PEFT drives: SORSA as an adapter type, from get_peft_model to save_pretrained."""
