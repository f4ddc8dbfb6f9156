"""Tests with vLLM: models, plans and judgement here, the driver that runs inside the engine's environment."""
