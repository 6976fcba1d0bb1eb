"""What the sites' raw data are like and what is wrong with them, as pages; nothing is trained."""
