"""The modules behind `01_prefill_decode.py`: a prompt prefilled in one process and decoded in another."""
