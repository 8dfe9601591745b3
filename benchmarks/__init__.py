"""What is measured, how, and the results files that the README quotes."""
