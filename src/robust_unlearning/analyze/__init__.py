"""The paper's claims, measured on a base model and on deltas of it.

Each analysis is a pure computing function on tensors, arrays or records that returns dataclasses, and a function
that makes a `Report` of them; `output.write` puts a report on disk.

| module | what |
|---|---|
| `variants` | the models: a base and any number of its deltas, over one load |
| `inputs` | the texts and questions, as tokens |
| `stack` | a model's decoder layers one by one |
| `derivatives` | Jacobian-vector products and curvature, never a whole matrix |
| `normality` | D'Agostino and Pearson's test, Holm's correction |
| `noise_sensitivity` | Appendix C, Eq. 33 |
| `shift` | Assumption 4.1: the shift that a forget-token causes |
| `output_change` | Theorem 4.2: the output's change under Gaussian latent noise |
| `curvature` | Eq. 5 to 9: the trace of the latent Hessian, predicted and observed change of the loss |
| `rejection` | Theorem 5.2: the paper's closed form, the exact one, and Monte Carlo |
| `theory` | the four of them together, on models |
| `activations` | what unlearning did to hidden states, and what a forget-token does to a question's |
| `harmfulness` | Figure 4: which forget n-grams harm most |
"""
