"""The published figures of Prefill-as-a-Service (arXiv 2604.15039), and the same computed here."""
