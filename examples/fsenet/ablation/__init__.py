"""The ablations of the FSENet paper: its tables 5 to 14, at the scale of the data at hand."""
