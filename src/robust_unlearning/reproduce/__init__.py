"""The paper, reproduced: a list of stages, what each stands for, the claims, and the report."""
