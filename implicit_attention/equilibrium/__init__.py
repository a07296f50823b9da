"""Fixed points of any map: solvers, gradients, and matrix-free linear algebra."""
