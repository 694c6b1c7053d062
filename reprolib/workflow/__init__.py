"""What runs everything: the graph of notebooks, figures and tables behind `make`, and single notebooks."""
