"""Figures and numbers of the paper's analysis. Needs scikit-learn: pip install "t2sda_hf[analysis]"."""
