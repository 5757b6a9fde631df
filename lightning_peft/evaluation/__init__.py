"""How a model is measured: scores of text, generated text, tasks of lm-evaluation-harness, and what a model lost against its base.

Everything here runs on the model as it stands, adapters on or off, without a copy of it, and leaves it and the random numbers as they were.
"""
