"""Colours and markers of all figures."""

# Okabe, Ito 2008, "Color Universal Design": told apart with any kind of colour vision; yellow last, faint on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = "osD^vPX*"
