"""What the anchors of a grafted model do for its text."""
