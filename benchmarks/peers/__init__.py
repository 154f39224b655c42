"""What others do in place of our layers, written anew from the formulas."""
