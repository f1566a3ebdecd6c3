"""Every check of an argument and the wording of its error; and what runs the code."""
