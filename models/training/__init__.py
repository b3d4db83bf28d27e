"""How tintype and its evaluator were trained: one command a stage, resumable, on CPU or GPU."""
