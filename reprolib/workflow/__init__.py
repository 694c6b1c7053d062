"""What runs everything: the graph of notebooks, figures and tables behind `make`, and single notebooks."""

import sys

# Whoever reads a notebook loads jsonschema, which loads this check of addresses where it can: two seconds for nothing.
sys.modules.setdefault("rfc3987_syntax", None)
