"""One primitive under every ranking loss: weighted sums of sigmoids, differentiable to any order.

    sigmoid_sums(queries [Q], problem [Q], sources [C, M], weights [C, M, K], temperature) -> [Q, K]
    out[q, k] = Σ_m weights[c, m, k] · σ((sources[c, m] − queries[q]) / τ_c),   c = problem[q]

A soft rank is such a sum, and so every ranking loss is arithmetic around this one call. The C
problems (classes, lists) are independent; queries are ragged and addressed by `problem`, so there
is neither a loop over classes nor padding.

Letters, here and in every backend:
    M  sources of a problem (pool rows)      Q  queries over all problems (positives)
    C  problems (classes)                    K  weight columns summed at once
    x  (source − query) / τ                  φₙ the n-th derivative of σ; φ₀ = σ

A metric is a function of `Problems`, made of sums over queries of what each is worth at its soft
ranks (`problems`, `ranked_sum`). Beneath, three layers: *choose* a backend (`choose`, `backends`),
*differentiate* (`ranked_sum` in one pass, `sums` to any order, `operator` for compilers), *compute*
(`dense` and `tiles`: the definition; `panels`: linear time; `cuda`: both as kernels). A backend is
a plan, built once for the geometry (queries, problem, sources, temperature) and asked for
Φₙ·weights and Φₙᵀ·cotangent, where Φₙ[q, m] = φₙ(x); and a second, leaner plan for what training
needs: soft ranks and their first derivative. `plan` has both contracts.
"""

from imbalanced_losses._ranking.backends import BACKENDS, PLANS, Backend, sigmoid_sums
from imbalanced_losses._ranking.plan import Processes, Rows
from imbalanced_losses._ranking.problems import Problems
from imbalanced_losses._ranking.ranks import Ranks

__all__ = ["BACKENDS", "PLANS", "Backend", "Problems", "Processes", "Ranks", "Rows", "sigmoid_sums"]
