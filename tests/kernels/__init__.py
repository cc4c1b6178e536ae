"""Every kernel against float64, at the sizes where kernels break, with guarded memory."""
