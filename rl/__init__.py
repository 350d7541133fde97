"""What the three scripts share: one room for each step of the data flow."""
