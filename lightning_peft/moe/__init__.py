"""Mixtures of experts: which token goes where, the experts' arithmetic, and what keeps their load balanced.

::

    x (n, d) ── router ── logits (n, E) ── Router.route ── Assignment ── run_experts(x, assignment, weights) ── y (n, d)
                                                    └── load_balancing_loss, z_loss ── with_auxiliary_loss (backward only)

What stands here knows no model and no method: tensors in, tensors out.
"""
