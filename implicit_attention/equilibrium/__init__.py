"""Fixed points of any map: solvers, gradients, and linear algebra without matrices."""
