"""Finding what is wrong: two models compared site by site, a wrong kernel found by halving, kernels beside kernels."""
