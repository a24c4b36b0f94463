"""The paper's claims, measured on a base model and on deltas of it.

Each analysis is a pure computing function on tensors, arrays or records that returns dataclasses, and a function
that makes a `Report` of them; `output.write` puts a report on disk.

| module | what |
|---|---|
| `variants` | the models: a base and any number of its deltas, over one load |
| `inputs` | the texts and questions, as tokens |
| `stack` | a model's decoder layers one by one |
| `derivatives` | Jacobian-vector products and curvature, never a whole matrix |
| `noise_sensitivity` | Appendix C, Eq. 33 |
| `activations` | what unlearning did to hidden states, and what a forget-token does to a question's |
| `harmfulness` | Figure 4: which forget n-grams harm most |
"""
